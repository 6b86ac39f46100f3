"""The backward of conv+ReLU+pool: which kernels run, and which tensors lie between them."""

from matplotlib.figure import Figure

from docs.pictures.canvas import SMALL, Canvas, Theme

HEIGHT, GAP = 0.4, 0.26
# Way, then rows from top to bottom; a row is tensors or kernels beside each other.
WAYS = {
    "stock": (
        ("t grad of the output", "t int64 indices"),
        ("k pool's backward",),
        ("t full-size gradient", "t output of ReLU"),
        ("k ReLU's backward",),
        ("t full-size gradient",),
        ("k dgrad", "k wgrad", "k bias"),
    ),
    "epilogue": (
        ("t grad of the output", "t codes, 1 byte"),
        ("k unpool, mask, bias",),
        ("t full-size gradient",),
        ("k dgrad", "k wgrad"),
    ),
    "epilogue+dgrad+wgrad": (
        ("t grad of the output", "t codes, 1 byte"),
        ("k dgrad", "k wgrad, bias"),
    ),
}


def backward(theme: Theme) -> Figure:
    """Draw the three ways beside each other."""
    canvas = Canvas.of(theme, 7.6, 4.45)
    width = 2.3
    for number, (title, rows) in enumerate(WAYS.items()):
        left = 0.15 + number * (width + 0.2)
        canvas.text(left, 0.25, title, align="left", bold=True)
        y = 0.5
        for i, row in enumerate(rows):
            each = (width - 0.08 * (len(row) - 1)) / len(row)
            for j, entry in enumerate(row):
                kind, text = entry.split(" ", 1)
                full = "full-size" in text or "of ReLU" in text
                colour = theme.blue if kind == "k" else theme.orange if full or "int64" in text else theme.green
                lines = text.replace(" ", "\n", 1) if each < 1.3 and len(text) > 8 else text
                canvas.box(
                    left + j * (each + 0.08),
                    y,
                    each,
                    HEIGHT,
                    lines,
                    colour=colour,
                    size=SMALL,
                    fill=0.45 if kind == "k" else 0.12,
                )
            y += HEIGHT
            if i + 1 < len(rows):
                canvas.arrow((left + width / 2, y + 0.02), (left + width / 2, y + GAP - 0.02))
                y += GAP
    for colour, text, x in (
        (theme.blue, "kernel", 2.7),
        (theme.green, "small tensor", 3.8),
        (theme.orange, "tensor as large as the convolution's output, or 8 bytes an index", 2.7),
    ):
        y = 3.75 if text != "kernel" and x == 2.7 else 3.45
        canvas.cell(x, y - 0.08, 0.22, 0.16, colour=colour, fill=0.4)
        canvas.text(x + 0.3, y, text, align="left", size=SMALL, colour=theme.quiet)
    return canvas.figure
