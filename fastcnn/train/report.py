"""What a run shows and writes at its end: one table, metrics.json and curves.png."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fastcnn.console.environment import hardware, versions
from fastcnn.console.files import atomic_write
from fastcnn.train.data import Dataset
from fastcnn.train.lane import FEW_CLASSES, Lane
from fastcnn.train.memory import METHOD
from fastcnn.train.settings import Settings

MAX_LOSS_ROWS = 10


def images_per_second(lane: Lane) -> float:
    """Return the median over the epochs: a burst of other work on the machine spoils one epoch, not the number."""
    return statistics.median(epoch.images_per_second for epoch in lane.epochs)


def largest_loss_difference(lanes: list[Lane]) -> float:
    """Return the largest difference of two loss curves at the same step."""
    first, second = (lane.losses for lane in lanes)
    return max((abs(a - b) for a, b in zip(first, second)), default=0.0)


def table(lanes: list[Lane], num_classes: int = 0) -> Table:
    """Build the table of one run: a column per network, and a column of ratios where there are two."""
    result = Table(caption=f"peak memory: {METHOD}", caption_justify="left")
    result.add_column()
    for lane in lanes:
        result.add_column(lane.title, justify="right")
    two = len(lanes) == 2
    if two:
        result.add_column("ratio", justify="right")
    last = len(lanes[0].epochs) - 1
    for index in sorted({round(row * last / (MAX_LOSS_ROWS - 1)) for row in range(MAX_LOSS_ROWS)}):
        result.add_row(f"loss, epoch {index + 1}", *(f"{lane.epochs[index].loss:.5f}" for lane in lanes))
    result.add_section()
    result.add_row("test accuracy", *(f"{lane.epochs[-1].test_accuracy:.2%}" for lane in lanes))
    if num_classes > FEW_CLASSES:
        result.add_row("top-5 accuracy", *(f"{lane.epochs[-1].test_top5:.2%}" for lane in lanes))
    speeds = [images_per_second(lane) for lane in lanes]
    result.add_row("images/s (median epoch)", *(f"{speed:,.0f}" for speed in speeds), *_ratio(speeds))
    peaks = [lane.peak_memory_bytes for lane in lanes]
    shown = ("n/a" if peak is None else f"{peak / 2**20:,.1f} MiB" for peak in peaks)
    result.add_row("peak memory", *shown, *_ratio([peak for peak in peaks if peak is not None]))
    if two:
        result.add_section()
        result.add_row("largest loss difference", "", f"{largest_loss_difference(lanes):.2e}")
    return result


def _ratio(values: Sequence[float]) -> list[str]:
    return [f"{values[1] / values[0]:.2f}x"] if len(values) == 2 and values[0] else []


def write_report(directory: Path, settings: Settings, data: Dataset, lanes: list[Lane], finished: bool) -> None:
    """Write curves.png and metrics.json: settings, versions, hardware, every step's loss, every epoch's numbers."""
    from fastcnn.train.curves import write_curves  # matplotlib takes a second to import

    metrics = {
        "finished": finished,
        "settings": asdict(settings),
        "data": {name: getattr(data, name) for name in ("train_size", "test_size", "classes", "notes")},
        "versions": versions(),
        "hardware": hardware(),
        "peak_memory": METHOD,
        "networks": {lane.title: _lane_metrics(lane) for lane in lanes},
    }
    if len(lanes) == 2:
        metrics["largest_loss_difference"] = largest_loss_difference(lanes)
    atomic_write(directory / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=2).encode()))
    title = f"{settings.model} on {settings.dataset}, {settings.device}, seed {settings.seed}"
    write_curves(directory / "curves.png", lanes, title, len(data.classes))


def _lane_metrics(lane: Lane) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in lane.model.parameters()),
        "cuda_graphs": lane.cuda_graphs(),
    }
    if lane.epochs:
        summary |= {
            "test_accuracy": lane.epochs[-1].test_accuracy,
            "test_top5": lane.epochs[-1].test_top5,
            "images_per_second": images_per_second(lane),
            "peak_memory_bytes": lane.peak_memory_bytes,
        }
    return {**summary, "epochs": [vars(epoch) for epoch in lane.epochs], "loss_per_step": lane.losses}
