"""A convolution as a matrix product, and the boxes that Hopper's copy engine brings."""

from matplotlib.figure import Figure

from docs.pictures.canvas import SMALL, Canvas, Theme


def implicit_gemm(theme: Theme) -> Figure:
    """Draw the three matrices with one program's tile in each, and what a row of the left one is."""
    canvas = Canvas.of(theme, 7.6, 3.5)
    canvas.text(0.2, 0.25, "image", align="left", size=SMALL, bold=True)
    cell, left, top = 0.22, 0.2, 0.45
    for i in range(7):
        for j in range(7):
            inside = 2 <= i < 5 and 1 <= j < 4
            canvas.cell(
                left + j * cell,
                top + i * cell,
                cell,
                cell,
                colour=theme.blue if inside else theme.quiet,
                fill=0.35 if inside else 0,
            )
    canvas.text(
        0.2,
        2.5,
        "a row of the left matrix: the\nwindow of one output pixel, all\ninput channels; only its\naddresses exist",
        align="left",
        size=SMALL,
        colour=theme.quiet,
    )
    canvas.arrow((1.8, 1.2), (2.45, 1.2), colour=theme.blue)
    x, y, wide, high = 2.6, 1.15, 1.6, 2.0
    canvas.text(x + wide / 2, y + high + 0.15, "K: places × input channels", size=SMALL, colour=theme.quiet)
    canvas.text(x - 0.14, y + 0.75, "M", size=SMALL, colour=theme.quiet)
    _matrix(canvas, x, y, wide, high, 0.0, 0.5, wide, 0.5, theme.blue)
    canvas.cell(x + 0.4, y + 0.5, 0.4, 0.5, colour=theme.blue, fill=0.45)
    canvas.text(x + wide / 2, y + 0.22, "pixels × places", size=SMALL)
    canvas.text(x + 0.6, y + 1.12, "BLOCK_K", size=SMALL - 1.5, colour=theme.quiet)
    canvas.text(4.4, y + 0.75, "×", size=14)
    x2 = 4.6
    _matrix(canvas, x2, y, 1.0, wide, 0.35, 0.0, 0.35, wide, theme.green)
    canvas.cell(x2 + 0.35, y + 0.4, 0.35, 0.4, colour=theme.green, fill=0.45)
    canvas.text(x2 + 0.5, y + wide + 0.15, "N: output channels", size=SMALL, colour=theme.quiet)
    canvas.text(x2 + 0.5, y - 0.16, "weights", size=SMALL, bold=True)
    canvas.text(5.85, y + 0.75, "=", size=14)
    x3 = 6.1
    _matrix(canvas, x3, y, 1.0, high, 0.35, 0.5, 0.35, 0.5, theme.orange)
    canvas.text(x3 + 0.5, y - 0.16, "output", size=SMALL, bold=True)
    canvas.text(x3 + 0.5, y + high + 0.15, "+ bias, ReLU\nas it is written", size=SMALL, colour=theme.quiet)
    canvas.text(x3 + 0.52, y + 1.2, "BLOCK_M\n× BLOCK_N", size=SMALL - 1.5, colour=theme.orange, align="center")
    return canvas.figure


def _matrix(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    height: float,
    left: float,
    top: float,
    wide: float,
    high: float,
    colour: str,
) -> None:
    """Draw a matrix and, inside it, the band that one program reads or writes."""
    canvas.cell(x, y, width, height, colour=canvas.theme.quiet)
    canvas.cell(x + left, y + top, wide, high, colour=colour, fill=0.2)
    canvas.outline(x + left, y + top, wide, high, colour=colour)


def boxes(theme: Theme) -> Figure:
    """Draw a box of pixels shifted by a tap, and the swapped operands."""
    canvas = Canvas.of(theme, 7.6, 2.7)
    canvas.text(0.2, 0.25, "a box of 4×4 pixels, shifted by a tap", align="left", size=SMALL, bold=True)
    cell, left, top = 0.24, 0.5, 0.75
    for i in range(-1, 6):
        for j in range(-1, 6):
            image = 0 <= i < 6 and 0 <= j < 6
            box = -1 <= i < 3 and -1 <= j < 3
            colour = theme.blue if box else theme.quiet
            if image or box:
                canvas.cell(
                    left + j * cell, top + i * cell, cell, cell, colour=colour, fill=0.4 if box and image else 0.0
                )
                if box and not image:
                    canvas.text(left + (j + 0.5) * cell, top + (i + 0.5) * cell, "0", size=SMALL, colour=theme.blue)
    canvas.outline(left, top, 4 * cell, 4 * cell, colour=theme.orange)
    canvas.outline(left - cell, top - cell, 4 * cell, 4 * cell, colour=theme.blue)
    canvas.text(
        2.2,
        0.75,
        "blue: what tap (-1, -1) reads;\noutside the image: zero,\nwhich is the padding",
        align="left",
        size=SMALL,
        colour=theme.blue,
    )
    canvas.text(2.2, 1.35, "orange: the pixels\nthat the tile computes", align="left", size=SMALL, colour=theme.orange)
    canvas.text(
        2.2,
        1.85,
        "one copy a box: one thread\nasks, no address arithmetic",
        align="left",
        size=SMALL,
        colour=theme.quiet,
    )
    _swapped(canvas, 4.35, 0.25)
    return canvas.figure


def _swapped(canvas: Canvas, x: float, y: float) -> None:
    theme = canvas.theme
    canvas.text(x, y, "weights left, pixels right", align="left", size=SMALL, bold=True)
    canvas.box(x, y + 0.55, 0.62, 1.0, "weights\nC_out ×\nC_in", colour=theme.green, size=SMALL)
    canvas.text(x + 0.76, y + 1.05, "×", size=12)
    canvas.box(x + 0.9, y + 0.55, 0.85, 0.62, "box\nC_in × pixels", colour=theme.blue, size=SMALL - 1)
    canvas.text(x + 1.89, y + 1.05, "=", size=12)
    canvas.cell(x + 2.05, y + 0.55, 0.85, 1.0, colour=theme.orange, fill=0.15)
    for i in range(4):
        canvas.cell(x + 2.05 + i * 0.2125, y + 0.85, 0.2125, 0.2, colour=theme.orange, fill=0.45)
    canvas.text(
        x + 1.75,
        y + 1.88,
        "a thread holds neighbouring pixels of a\nchannel: a 2×2 window needs no exchange",
        size=SMALL,
        colour=theme.quiet,
    )
