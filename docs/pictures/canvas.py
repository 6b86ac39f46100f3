"""What the pictures are drawn with: two themes, a canvas in inches, boxes, arrows, grids of numbers."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

SMALL, NORMAL, LARGE = 7.5, 9.0, 10.5  # points


@dataclass(frozen=True)
class Theme:
    """Colours: of text and lines, and of four kinds of things that a picture tells apart."""

    name: str
    ink: str
    quiet: str
    paper: str
    blue: str
    orange: str
    green: str
    violet: str


THEMES = (
    Theme("light", "#1c2126", "#5f6a75", "#ffffff", "#2f7fc4", "#d9822b", "#2a8f57", "#8359b5"),
    Theme("dark", "#e3e8ed", "#a3aeb9", "#1e2129", "#6db1ee", "#f0a35a", "#5fc48d", "#b795e6"),
)


@dataclass
class Canvas:
    """A drawing area in inches; y goes down."""

    figure: Figure
    axes: Axes
    theme: Theme

    @classmethod
    def of(cls, theme: Theme, width: float, height: float) -> "Canvas":
        """Make an empty canvas."""
        figure = Figure((width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        return cls(figure, axes, theme)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = NORMAL,
        colour: str | None = None,
        align: str = "center",
        bold: bool = False,
    ) -> None:
        """Write text whose middle line is at y."""
        weight = "bold" if bold else "normal"
        self.axes.text(
            x,
            y,
            text,
            size=size,
            color=colour or self.theme.ink,
            ha=align,
            va="center",
            weight=weight,
            linespacing=1.35,
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        colour: str,
        fill: float = 0.22,
        size: float = NORMAL,
    ) -> None:
        """Draw a rounded box with text in its middle; `fill`: how much of the colour is inside."""
        style = "round,pad=0,rounding_size=0.06"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, lw=0, fc=colour, alpha=fill))
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, lw=1.1, fc="none", ec=colour))
        if text:
            self.text(x + width / 2, y + height / 2, text, size=size)

    def cell(self, x: float, y: float, width: float, height: float, *, colour: str, fill: float = 0.0) -> None:
        """Draw a plain rectangle."""
        self.axes.add_patch(Rectangle((x, y), width, height, lw=0, fc=colour, alpha=fill))
        self.axes.add_patch(Rectangle((x, y), width, height, lw=0.8, fc="none", ec=colour))

    def outline(self, x: float, y: float, width: float, height: float, *, colour: str) -> None:
        """Draw a thick frame."""
        self.axes.add_patch(Rectangle((x, y), width, height, lw=2.2, fc="none", ec=colour, zorder=3))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], *, colour: str | None = None) -> None:
        """Draw an arrow from point to point."""
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=9,
                lw=1.1,
                color=colour or self.theme.quiet,
                shrinkA=0,
                shrinkB=0,
            )
        )

    def numbers(
        self,
        x: float,
        y: float,
        rows: Sequence[Sequence[object]],
        cell: float,
        colour_of: Callable[[int, int], str | None] = lambda row, column: None,
    ) -> None:
        """Draw a grid of numbers; `colour_of` tells which cells are filled."""
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                colour = colour_of(i, j)
                at = (x + j * cell, y + i * cell)
                self.cell(*at, cell, cell, colour=self.theme.quiet)
                if colour:
                    self.cell(*at, cell, cell, colour=colour, fill=0.35)
                self.text(at[0] + cell / 2, at[1] + cell / 2, str(value), size=SMALL)


def svg(figure: Figure) -> str:
    """Return a figure as SVG: transparent, its letters drawn, the same at each build."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastcnn", "font.family": "DejaVu Sans"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()
