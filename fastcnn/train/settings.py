"""The settings of a run."""

from dataclasses import dataclass, field, replace
from typing import Any

from fastcnn.console.errors import OptionError

FREE_ON_RESUME = (
    "epochs",
    "device",
    "backend",
    "graph",
    "data",
    "workers",
    "parallel",
    "checkpoint_every",
    "tensorboard",
    "deterministic",
    "skip_broken",
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; each field is an option of ``fastcnn train`` and is described there.

    Example:
        >>> Settings(dataset="mnist", model="mnist", input_size=(1, 28, 28)).batch_size
        100
    """

    dataset: str
    model: str
    input_size: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    compare: bool = False
    backend: str = "auto"
    epochs: int = 6
    batch_size: int = 100
    lr: float = 1e-3
    lr_step: int = 0
    optimizer: str = "adam"
    weight_decay: float = 0.0
    device: str = "cpu"
    amp: str = "off"
    graph: bool = True
    data: str | None = None
    seed: int = 0
    workers: int = 0
    parallel: str = "ddp"
    checkpoint_every: int = 0
    tensorboard: bool = False
    deterministic: bool = True
    weights: str | None = None
    skip_broken: bool = False


def resumed(asked: Settings, given: set[str], stored: dict[str, Any], source: str) -> Settings:
    """Return the settings with which training continues: those ``asked`` for where ``given`` by name, else ``stored``.

    Raises :class:`OptionError`, which names the checkpoint (``source``), if one that decides the losses differs.
    """
    before = Settings(**{**stored, "input_size": tuple(stored["input_size"])})
    for name in given:
        old, wanted = getattr(before, name), getattr(asked, name)
        if name not in FREE_ON_RESUME and wanted != old:
            raise OptionError(f"{source}: was trained with {name.replace('_', '-')} {old!r}, not {wanted!r}")
    return replace(before, **{name: getattr(asked, name) for name in given})
