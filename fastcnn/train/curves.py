"""curves.png: loss per step, where the learning rate changed, and test accuracy per epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastcnn.console.files import atomic_write
from fastcnn.train.lane import FEW_CLASSES, Lane

# Two curves that agree lie on each other: the first is drawn wide and light, the second thin and dark on top.
STYLES: tuple[dict[str, Any], ...] = ({"color": "#f5b041", "linewidth": 4.0}, {"color": "#1b4f72", "linewidth": 1.2})


def write_curves(path: Path, lanes: list[Lane], title: str, num_classes: int = 0) -> None:
    """Draw the curves of one network or of two side by side, with their difference, as a PNG."""
    figure = Figure(figsize=(10, 4.8), dpi=140, layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1), height_ratios=(2.6, 1))
    two = len(lanes) == 2
    loss_axes = figure.add_subplot(grid[0, 0] if two else grid[:, 0])
    styles = STYLES if two else STYLES[1:]
    _draw_losses(loss_axes, lanes, styles)
    if two:
        _draw_difference(figure.add_subplot(grid[1, 0], sharex=loss_axes), lanes)
        loss_axes.tick_params(labelbottom=False)
    else:
        loss_axes.set_xlabel("step")
    _draw_accuracy(figure.add_subplot(grid[:, 1]), lanes, styles, num_classes)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
    # A Figure without pyplot draws through Agg and needs no display.
    atomic_write(path, lambda file: figure.savefig(file, format="png"))


def _plot(axes: Axes, values: Sequence[float], **style: Any) -> None:
    axes.plot(range(1, len(values) + 1), values, **style)


def _draw_losses(axes: Axes, lanes: list[Lane], styles: tuple[dict[str, Any], ...]) -> None:
    for lane, style in zip(lanes, styles):
        _plot(axes, lane.losses, label=lane.title, marker="o" if len(lane.losses) == 1 else None, **style)
    rates = [*(epoch.lr for epoch in lanes[0].epochs), lanes[0].lr]
    steps_per_epoch = (len(lanes[0].losses) - lanes[0].step) // max(1, len(lanes[0].epochs))
    for epoch in range(1, len(rates)):
        if rates[epoch] != rates[epoch - 1] and epoch * steps_per_epoch < len(lanes[0].losses):
            axes.axvline(epoch * steps_per_epoch, color="#aaaaaa", linewidth=0.8, linestyle=":")
    if any(loss > 0 for lane in lanes for loss in lane.losses):
        axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False)


def _draw_difference(axes: Axes, lanes: list[Lane]) -> None:
    difference = [abs(first - second) for first, second in zip(lanes[0].losses, lanes[1].losses)]
    _plot(axes, difference, color="#777777", linewidth=1)
    if any(difference):
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    else:
        axes.set_yticks([0])
        axes.text(0.5, 0.7, "equal at every step", transform=axes.transAxes, ha="center", color="#777777")
    axes.set_xlabel("step")
    axes.set_ylabel("difference")


def _draw_accuracy(axes: Axes, lanes: list[Lane], styles: tuple[dict[str, Any], ...], num_classes: int) -> None:
    for lane, style in zip(lanes, styles):
        accuracy = [epoch.test_accuracy for epoch in lane.epochs]
        _plot(axes, accuracy, marker="o", markersize=4, label=lane.title, **style)
        if num_classes > FEW_CLASSES:
            _plot(axes, [epoch.test_top5 for epoch in lane.epochs], linestyle="--", label="top-5 accuracy", **style)
            axes.legend(frameon=False)
    axes.set_xlim(0.5, max(1, *(len(lane.epochs) for lane in lanes)) + 0.5)  # a single epoch is a point
    low, high = axes.get_ylim()  # which become at least a tenth apart, with no tick above 100 %
    low = max(0.0, min(low, high - 0.1))
    axes.set_ylim(low, min(max(high, low + 0.1), 1.0 + (1.0 - low) * 0.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy")
