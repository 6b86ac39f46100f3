"""Local response normalization: the window over channels, and how often memory is passed."""

from matplotlib.figure import Figure

from docs.pictures.canvas import LARGE, SMALL, Canvas, Theme

SIZE, CHANNELS, HERE = 5, 12, 5
# How often torch.nn.functional.local_response_norm reads and writes as much as its input, operation by operation.
STOCK = {
    "x * x": (1, 1),
    "pad": (1, 1),
    "avg_pool3d": (1, 1),
    "* alpha": (1, 1),
    "+ k": (1, 1),
    "pow": (1, 1),
    "x / …": (2, 1),
}


def lrn(theme: Theme) -> Figure:
    """Draw the channels of one pixel with a window, and both ways' passes."""
    canvas = Canvas.of(theme, 7.6, 3.35)
    cell, left, top = 0.42, 0.2, 0.55
    canvas.text(left, 0.3, "the channels of one pixel", align="left", size=SMALL, bold=True)
    for c in range(CHANNELS):
        inside = abs(c - HERE) <= SIZE // 2
        colour = theme.orange if c == HERE else theme.blue if inside else theme.quiet
        canvas.cell(left + c * cell, top, cell, cell, colour=colour, fill=0.35 if inside else 0.0)
        canvas.text(left + (c + 0.5) * cell, top + cell / 2, f"x{c}", size=SMALL)
    start = left + (HERE - SIZE // 2) * cell
    canvas.outline(start, top, SIZE * cell, cell, colour=theme.blue)
    canvas.text(
        start + SIZE * cell / 2,
        top + cell + 0.22,
        "size = 5: their squares are summed, in float32",
        size=SMALL,
        colour=theme.blue,
    )
    canvas.text(
        5.55, top + cell / 2, r"$y_c = x_c \,/\, (k + \frac{\alpha}{n}\sum x^2)^{\beta}$", align="left", size=LARGE
    )
    _passes(canvas, 1.75)
    return canvas.figure


def _passes(canvas: Canvas, y: float) -> None:
    theme, unit = canvas.theme, 0.4
    reads, writes = (sum(counts) for counts in zip(*STOCK.values()))
    for title, passes, row in (
        (f"stock: {reads} reads, {writes} writes", STOCK, 0),
        ("fused: 1 read, 1 write", {"lrn": (1, 1)}, 1),
    ):
        top = y + row * 0.85
        canvas.text(0.2, top, title, align="left", size=SMALL, bold=True)
        x = 0.2
        for name, (read, write) in passes.items():
            width = (read + write) * unit
            canvas.box(x, top + 0.14, width - 0.04, 0.5, colour=theme.quiet, fill=0.08)
            for i in range(read + write):
                colour = theme.blue if i < read else theme.orange
                canvas.cell(x + 0.03 + i * unit, top + 0.42, unit - 0.1, 0.16, colour=colour, fill=0.3)
            canvas.text(x + width / 2 - 0.02, top + 0.28, name, size=SMALL)
            x += width
    canvas.cell(5.2, y + 1.2, 0.3, 0.2, colour=theme.blue, fill=0.3)
    canvas.text(5.6, y + 1.3, "read", align="left", size=SMALL)
    canvas.cell(6.2, y + 1.2, 0.3, 0.2, colour=theme.orange, fill=0.3)
    canvas.text(6.6, y + 1.3, "write", align="left", size=SMALL)
