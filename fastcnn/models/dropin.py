"""What all models share: plain layers that fuse themselves."""

from typing import Any

from torch import nn

from fastcnn.fuse import fuse, is_fused

__all__ = ["DropIn"]


class DropIn(nn.Module):
    """A model that fuses itself when it is made, and when a saved whole one is loaded, unless it was unfused."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fuses": is_fused(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fuses = state.pop("_fuses", True)
        super().__setstate__(state)
        if fuses and _is_whole(self) and not is_fused(self):
            fuse(self)


def _is_whole(module: nn.Module) -> bool:
    """Whether a module and those in it are there: one may be loaded before a module that it leads back to."""
    there = "_modules" in vars(module)
    return there and all(_is_whole(child) for child in module._modules.values() if child is not None)
