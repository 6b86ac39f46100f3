"""The settings of a run."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastcnn.console.errors import OptionError


def _free(default: Any) -> Any:
    """Declare a setting that may change where a run goes on; the others decide its losses."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; each field is an option of ``fastcnn train`` and is described there."""

    dataset: str
    model: str
    input_size: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    compare: bool = False
    backend: str = _free("auto")
    epochs: int = _free(6)
    batch_size: int = 100
    lr: float = 1e-3
    lr_step: int = 0
    optimizer: str = "adam"
    weight_decay: float = 0.0
    device: str = _free("cpu")
    amp: str = "off"
    graph: bool = _free(True)
    data: str | None = _free(None)
    seed: int = 0
    workers: int = _free(0)
    parallel: str = _free("ddp")
    checkpoint_every: int = _free(0)
    tensorboard: bool = _free(False)
    deterministic: bool = _free(True)
    weights: str | None = None
    skip_broken: bool = _free(False)


def resumed(asked: Settings, given: set[str], stored: dict[str, Any], source: str) -> Settings:
    """Return the settings with which training continues: those ``asked`` for where ``given`` by name, else ``stored``.

    Raises :class:`OptionError`, which names the checkpoint (``source``), if one that decides the losses differs.
    """
    before = Settings(**{**stored, "input_size": tuple(stored["input_size"])})
    for each in fields(Settings):
        old, wanted = getattr(before, each.name), getattr(asked, each.name)
        if each.name in given and wanted != old and "free" not in each.metadata:
            raise OptionError(f"{source}: was trained with {each.name.replace('_', '-')} {old!r}, not {wanted!r}")
    return replace(before, **{name: getattr(asked, name) for name in given})
