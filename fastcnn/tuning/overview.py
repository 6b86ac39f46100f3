"""What is known of the devices here, for ``fastcnn doctor``: the tables, and what the proof has found."""

from collections.abc import Iterator

import torch

from fastcnn.tuning import proof
from fastcnn.tuning.device import device_name, versions
from fastcnn.tuning.places import place_of
from fastcnn.tuning.table import Unreadable, read, shipped_path, user_path


def overview() -> Iterator[tuple[str, str]]:
    """Yield names and texts: each table with its entries, and the proof, for each kind of device that is here once."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for name, device in {device_name(each): each for each in [torch.device("cpu"), *devices]}.items():
        yield "tuning table", _table(name, device)
        yield "kernels proved", _proof(device)


def _table(name: str, device: torch.device) -> str:
    path = user_path(name)
    try:
        entries = list(read(path, name).values())
        shipped = len(read(shipped_path(name), name))
    except Unreadable as reason:
        return f"{path} is ignored: {reason}"
    now = versions(device.type)
    mine = [each for each in entries if each["key"].get("versions") == now]
    others = f", {len(entries) - len(mine)} of other versions" if len(mine) < len(entries) else ""
    tried = sum(each.get("by") == "trial" for each in mine)
    kernels = sum(each["backend"] != "torch" for each in mine)
    how = f" ({tried} by trials; kernels win {kernels})" if mine else ""
    with_versions = ", ".join(f"{key} {value}" for key, value in now.items() if value is not None)
    also = f"; {shipped} shipped" if shipped else ""
    return f"{name}: {len(mine)} entries{how} with {with_versions}{others}{also}: {path}"


def _proof(device: torch.device) -> str:
    place = place_of(device)
    verdicts = proof.read(proof.path_of(place.name), place.identity())
    if not verdicts:
        return f"{place.name}: not yet with this build: the first trial does so"
    out = [f"{kernel} is left out: {problem}" for kernel, problem in verdicts.items() if problem]
    return "; ".join([f"{place.name}: {len(verdicts) - len(out)} of {len(verdicts)}", *out])
