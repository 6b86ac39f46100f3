"""The table at the end of a run: each cell's times beside stock torch, the best baseline and the floor."""

from collections.abc import Iterable
from typing import Any

CELL = ("subject", "case", "mode", "dtype", "layout")
NOT_BASELINES = ("copy", "eager again")


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of the table; a cell without a time of `eager` or of `fastcnn` has no line."""
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    floors: dict[tuple[str, ...], float | None] = {}
    for row in rows:
        if row["error"] is None:
            key = tuple(row[name] for name in CELL)
            cells.setdefault(key, {})[row["method"]] = row["seconds"]["median"]
            floors[key] = row["floor_seconds"]
    heads = ("eager ms", "best baseline, ms", "fastcnn ms", "vs eager", "vs best", "of floor", "best forced, ms")
    title = f"{'cell':<100}" + f"{heads[0]:>11} {heads[1]:>30} {heads[2]:>11} {heads[3]:>9} {heads[4]:>8}"
    body = [_line(key, times, floors[key]) for key, times in cells.items() if {"eager", "fastcnn"} <= set(times)]
    return [f"{title} {heads[5]:>9} {heads[6]:>30}", *body]


def _line(key: tuple[str, ...], times: dict[str, float], floor: float | None) -> str:
    ours = times["fastcnn"]
    baselines = {name: time for name, time in times.items() if not _is_ours(name) and name not in NOT_BASELINES}
    forced = {name: time for name, time in times.items() if _is_ours(name) and name != "fastcnn"}
    best = min(baselines, key=lambda name: baselines[name])
    fraction = f"{floor / ours:>8.0%}" if floor else ""
    parts = [
        f"{' '.join(key):<100}",
        f"{times['eager'] * 1e3:>10.3f}",
        f"{best + _time(baselines[best]):>30}",
        f"{ours * 1e3:>11.3f} {times['eager'] / ours:>8.2f}x {baselines[best] / ours:>7.2f}x {fraction:>9}",
    ]
    if forced:
        name = min(forced, key=lambda name: forced[name])
        parts.append(f"{name.removeprefix('fastcnn ') + _time(forced[name]):>30}")
    return " ".join(parts)


def _is_ours(method: str) -> bool:
    return method.split()[0] == "fastcnn"


def _time(seconds: float) -> str:
    return f" {seconds * 1e3:.3f}"
