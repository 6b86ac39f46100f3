"""The children of AlexNet2012 and the stages in which they run."""

from matplotlib.figure import Figure

from benchmarks.shapes import Layer, Stage
from benchmarks.shapes import stages as stages_of
from docs.pictures.canvas import SMALL, Canvas, Theme

NAMES = {"Conv2d": "Conv", "LocalResponseNorm": "LRN", "MaxPool2d": "Pool"}
WIDTH, GAP, ROW = 0.5, 0.06, 1.45  # inches: of a layer, between layers, from row to row
PER_ROW = 4


def stages(theme: Theme) -> Figure:
    """Draw each stage as a frame around its layers, with the shape that it writes."""
    found = list(stages_of("alexnet2012", 1))
    rows = [found[i : i + PER_ROW] for i in range(0, len(found), PER_ROW)]
    canvas = Canvas.of(theme, 7.6, ROW * len(rows) + 0.15)
    for number, row in enumerate(rows):
        x = 0.15
        for stage in row:
            x = _draw(canvas, stage, x, 0.15 + number * ROW, last=stage is found[-1])
    return canvas.figure


def _draw(canvas: Canvas, stage: Stage, x: float, y: float, *, last: bool) -> float:
    theme = canvas.theme
    kinds = {"conv": theme.blue, "lrn": theme.orange, "linear": theme.green, "max": theme.violet}
    alone = len(stage.layers) == 1
    colour = theme.quiet if alone else kinds[stage.stem.split("_")[0]]
    width = max(len(stage.layers) * (WIDTH + GAP) + GAP, 1.22)
    canvas.box(x, y, width, 0.95, colour=colour, fill=0.10)
    canvas.text(
        x + width / 2, y + 0.17, "the layer itself" if alone else stage.stem, size=SMALL, bold=True, colour=colour
    )
    start = x + (width - len(stage.layers) * (WIDTH + GAP) + GAP) / 2
    for i, layer in enumerate(stage.layers):
        canvas.box(start + i * (WIDTH + GAP), y + 0.34, WIDTH, 0.46, _name(layer), colour=colour, size=SMALL)
    canvas.text(x + width / 2, y + 1.12, "×".join(map(str, stage.output[1:])), size=SMALL, colour=theme.quiet)
    if not last:
        canvas.arrow((x + width + 0.03, y + 0.57), (x + width + 0.25, y + 0.57))
    return x + width + 0.28


def _name(layer: Layer) -> str:
    kind = type(layer.module).__name__
    return f"{NAMES.get(kind, kind)}\n.{layer.name.rpartition('.')[2]}"
