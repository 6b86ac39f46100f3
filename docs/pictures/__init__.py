"""The pictures of the guide: drawn from the models' shapes and the committed results at each build of the site."""

from collections.abc import Callable, Iterator

from matplotlib.figure import Figure

from docs.pictures.backward import backward
from docs.pictures.canvas import THEMES, Theme, svg
from docs.pictures.convolution import boxes, implicit_gemm
from docs.pictures.gain import gain
from docs.pictures.intensity import intensity
from docs.pictures.lrn import lrn
from docs.pictures.pooling import codes
from docs.pictures.stages import stages
from docs.pictures.traffic import traffic

PICTURES: dict[str, Callable[[Theme], Figure]] = {
    "stages": stages,
    "traffic": traffic,
    "codes": codes,
    "lrn": lrn,
    "implicit-gemm": implicit_gemm,
    "boxes": boxes,
    "backward": backward,
    "intensity": intensity,
}


def drawn() -> Iterator[tuple[str, str]]:
    """Yield each picture's name and SVG: `codes-light`, `codes-dark`, …"""
    for name, draw in PICTURES.items():
        for theme in THEMES:
            yield f"{name}-{theme.name}", svg(draw(theme))


def readme() -> Iterator[tuple[str, str]]:
    """Yield the pictures that stand in the README, which no build of the site draws: `gain-light`, `gain-dark`."""
    for theme in THEMES:
        yield f"gain-{theme.name}", svg(gain(theme))
