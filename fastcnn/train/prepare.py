"""What a run needs before its first step: device, data and networks that fit each other."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fastcnn
from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.models import (
    abridged,
    build_model,
    check_same_architecture,
    check_shapes,
    normalize_first,
    pretrained_classifier,
)
from fastcnn.console.options import check_backend, device_named
from fastcnn.train.data import Dataset, Feed, load_idx_dataset
from fastcnn.train.distributed import DataParallel, OneProcess, World
from fastcnn.train.folder import FolderData
from fastcnn.train.graphed import CAPTURES
from fastcnn.train.lane import Lane, build_optimizer
from fastcnn.train.settings import Settings

MAX_WORKERS = 16


def default_workers(world: World) -> int:
    """Return how many processes decode images for one training process: its share of the machine's cores.

    Example:
        >>> 1 <= default_workers(World()) <= MAX_WORKERS
        True
    """
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // world.local_size))


def prepare(
    settings: Settings,
    world: World,
    resume: dict[str, Any] | None,
    *,
    console: Console | None = None,
    changed_data: bool = False,
) -> tuple[Dataset, list[Lane]]:
    """Load the data and build the networks, with the state of a checkpoint if one is resumed.

    Raises :class:`UserError` where something that was asked for is not there, or does not fit the rest.
    """
    check_backend(settings.backend)
    device = _device(settings, world)
    feed = Feed(settings.input_size, settings.batch_size, settings.seed, device, settings.workers, world)
    directory = Path(settings.data) if settings.data else None
    if settings.dataset != "imagefolder":
        data: Dataset = load_idx_dataset(settings.dataset, directory, feed)
    elif directory is not None:
        data = FolderData(directory, feed, skip_broken=settings.skip_broken, console=console)
    else:
        raise OptionError("imagefolder needs --data DIR, a folder with one folder of images per class")
    if resume is not None:
        _check_same_data(data, resume, changed_data)
    options = {**settings.options}
    options.setdefault("num_classes", len(data.classes))
    check_shapes(settings.model, options, settings.input_size, data.classes)
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, options=options)
    if settings.weights and resume is None:
        data.notes += (load_pretrained(model, settings.model, settings.weights, progress=world.rank == 0),)
    if data.gives_bytes:
        normalize_first(model, data.statistics)
    lanes = _lanes(model, settings, device, world)
    if resume is not None:
        for lane in lanes:
            lane.load_state_dict(resume["lanes"][lane.title])
        if all(len(lane.epochs) >= settings.epochs for lane in lanes):
            raise UserError(f"all {settings.epochs} epochs are done; ask for more with --epochs")
    return data, lanes


def _device(settings: Settings, world: World) -> torch.device:
    device = device_named(settings.device)
    if device.type == "cuda":
        device = _gpu(device, world)
    if settings.amp == "fp16" and device.type != "cuda":
        raise OptionError(f"--amp fp16 needs a CUDA device, not {device}; --amp bf16 runs here")
    if settings.parallel == "owt" and world.size == 1:
        raise OptionError("--parallel owt needs several processes: torchrun --nproc-per-node 2 -m fastcnn train …")
    if settings.parallel == "owt" and settings.amp == "fp16":
        raise OptionError("--parallel owt cannot scale fp16's gradients; --amp bf16 needs no scaling")
    return device


def _gpu(device: torch.device, world: World) -> torch.device:
    """Return this process's GPU: each process of a machine has its own."""
    count = torch.cuda.device_count()
    if world.size > 1 and device.index is None:
        if world.local_size > count:
            raise OptionError(f"torchrun started {world.local_size} processes here; torch sees {count} CUDA devices")
        device = torch.device("cuda", world.local_rank)
    if (device.index or 0) >= count:
        raise OptionError(f"--device {device}: torch sees {count} CUDA devices here")
    if world.size > 1:
        torch.cuda.set_device(device)
    return device


def _check_same_data(data: Dataset, resume: dict[str, Any], changed_data: bool) -> None:
    if list(data.classes) != resume["classes"]:
        raise UserError(
            f"the checkpoint was trained on {len(resume['classes'])} classes ({abridged(resume['classes'])}), "
            f"the data has {len(data.classes)} ({abridged(data.classes)})"
        )
    before, now = resume["train_size"], data.train_size
    if before == now:
        return
    changed = f"the checkpoint was trained on {before:,} images, the data has {now:,}"
    if not changed_data:
        raise UserError(f"{changed}; restore the former images, or continue with the present ones by --changed-data")
    data.notes += (f"{changed}: from here on, the losses are not those of a run that was never stopped",)


def load_pretrained(model: nn.Module, name: str, weights: str, progress: bool = True) -> str:
    """Load torchvision's weights into a network, except a last layer of another number of classes; say what was loaded.

    ``progress`` shows that of a download. Options that change the network's layers are a :class:`UserError`.
    """
    chosen, pretrained = pretrained_classifier(name, weights, progress)
    own = model.state_dict()
    head, layer = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)][-1]
    classes = len(chosen.meta["categories"])
    starts_anew = layer.out_features != classes
    if starts_anew:
        pretrained |= {f"{head}.{key}": value for key, value in layer.state_dict().items()}
    # Older weights lack the batch counters of batch normalization.
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | pretrained
    try:
        check_same_architecture(name, state, own)
    except UserError as error:
        raise UserError(f"--weights {weights}: {error}") from error
    model.load_state_dict(state)
    if starts_anew:
        return f"weights: {chosen!r}; {head} starts anew, for {layer.out_features} classes instead of {classes}"
    return f"weights: {chosen!r}; {head} is kept: the data are taken to have its {classes} classes"


def _lanes(model: nn.Module, settings: Settings, device: torch.device, world: World) -> list[Lane]:
    networks = {"fastcnn": model}
    if settings.compare:
        networks = {"stock torch": fastcnn.unfuse(copy.deepcopy(model)), **networks}
    lanes = []
    for title, network in networks.items():
        layout = _layout(settings.parallel, network.to(device), world)
        lane = Lane(
            title,
            network,
            build_optimizer(settings.optimizer, network, settings.lr, settings.weight_decay, layout.splits),
            device,
            settings.seed,
            backend=settings.backend if title == "fastcnn" else "torch",
            amp=settings.amp,
            graph=settings.graph and device.type in CAPTURES and world.size == 1,  # a graph holds no exchange
            parallel=layout,
            lr_step=settings.lr_step,
        )
        lanes.append(lane)
    return lanes


def _layout(name: str, model: nn.Module, world: World) -> OneProcess:
    """Lay a network out over the processes, as ``ddp`` or ``owt``; a single process keeps it as it is."""
    if world.size == 1:
        return OneProcess(model, world)
    if name == "ddp":
        return DataParallel(model, world)
    from fastcnn.train.one_weird_trick import OneWeirdTrick  # DTensor takes a second to import

    return OneWeirdTrick(model, world)
