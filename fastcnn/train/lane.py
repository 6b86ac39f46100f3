"""One network in training: its optimizer, random stream and position, and how a checkpoint holds them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.console.errors import UserError
from fastcnn.console.models import check_same_architecture
from fastcnn.train.distributed import OneProcess
from fastcnn.train.graphed import CAPTURES, GraphedStep, make_capturable

STEPS_PER_GRAPH = 10  # a launch costs some 10 microseconds, a fifth of an MNIST step; Ctrl-C waits for the last of them
STREAM_STRIDE = 1_000_003  # between the seeds of two processes' random streams
FEW_CLASSES = 10  # with so few, top-5 accuracy says little
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# How an optimizer runs, not what it computes: taken from the device, not from the checkpoint. So is the learning rate,
# which is a tensor on a GPU; its value comes from the settings.
OF_THE_DEVICE = ("lr", "capturable", "foreach", "fused")


class Diverged(UserError):
    """The loss or the weights are no longer finite."""


def build_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, splits: bool = False
) -> torch.optim.Optimizer:
    """Build an optimizer: fused and ready for CUDA graphs on a GPU, plain if the layout ``splits`` parameters.

    Example:
        >>> build_optimizer("adam", nn.Linear(2, 1), lr=0.01, weight_decay=0.0).param_groups[0]["lr"]
        0.01
    """
    parameters = list(model.parameters())
    if splits:
        return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, foreach=False)
    fused = True if parameters[0].device.type in CAPTURES else None
    optimizer = OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    make_capturable(optimizer)  # without graphs too, so that the losses are the same
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], layout: OneProcess) -> None:
    """Load the state of the same optimizer, whatever the device and the layout that it was saved from."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        index: {name: layout.split_like(value, parameters[index]) for name, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    groups = [
        {**saved, **{name: own[name] for name in OF_THE_DEVICE if name in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch; times are of training alone, and ``waited`` the part of them spent waiting for images."""

    loss: float
    test_loss: float
    test_accuracy: float
    test_top5: float
    seconds: float
    waited: float
    images_per_second: float
    lr: float


@dataclass
class Lane:
    """One network in training, with all that a checkpoint must hold to continue as if never stopped.

    Each lane has its own random number stream, so that two networks that take turns draw the same dropout masks.
    ``step`` and ``seconds`` are of the current epoch; ``waited`` of the seconds went by waiting for images.
    """

    title: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int
    backend: str | None = None  # None: the one in use
    amp: str = "off"
    graph: bool = False
    parallel: InitVar[OneProcess | None] = None
    lr_step: int = 0  # epochs after which the learning rate is divided by ten; 0: never
    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    peak_memory_bytes: int | None = None  # of a step, known at the end of a run

    def __post_init__(self, parallel: OneProcess | None) -> None:
        self.layout = parallel or OneProcess(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self._graphed: dict[str, GraphedStep] = {}
        torch.manual_seed(self.seed + STREAM_STRIDE * self.layout.parts.rank)
        self.note_rng()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphed": {}}  # a copy has parameters of its own

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def steps_at_once(self) -> int:
        """How many steps are drawn, and captured, together."""
        return STEPS_PER_GRAPH if self.graph else 1

    def graphed(
        self, name: str, step: Callable[..., Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> Callable[..., Tensor]:
        """Return ``step``, or what replays it as a CUDA graph: the same one for the same name."""
        if not self.graph:
            return step
        if name not in self._graphed:
            self._graphed[name] = GraphedStep(step, optimizer)
        return self._graphed[name]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run under this lane's backend and from the state of its random number stream."""
        torch.set_rng_state(self._rng["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._rng["cuda"], self.device)
        with fastcnn.use_backend(self.backend) if self.backend else contextlib.nullcontext():
            yield
        self.note_rng()

    def note_rng(self) -> None:
        """Remember the state of the random number stream."""
        self._rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            self._rng["cuda"] = torch.cuda.get_rng_state(self.device)

    def cuda_graphs(self) -> str:
        """Say whether training runs as CUDA graphs: ``captured``, ``off``, or why it cannot."""
        step = self._graphed.get("train")
        return (step.reason or "captured") if step else "off"

    def autocast(self) -> torch.autocast:
        """Return the autocast context that --amp asks for."""
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def state_dict(self) -> dict[str, Any]:
        """Return whole tensors and plain values, or raise :class:`Diverged`; all processes must call it."""
        model = self.layout.whole(self.model.state_dict())
        if not all(bool(value.isfinite().all()) for value in model.values()):
            raise self.diverged("the weights became infinite or nan", self.step)
        return {
            "model": model,
            "optimizer": self.layout.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "rng": self.layout.world.gather(self._rng),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "step": self.step,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, whatever the number of processes that it was saved from."""
        own = self.model.state_dict()
        check_same_architecture(type(self.model).__name__, state["model"], own)
        weights = {name: self.layout.split_like(value, own[name]) for name, value in state["model"].items()}
        self.model.load_state_dict(weights)
        load_optimizer(self.optimizer, state["optimizer"], self.layout)
        self.scaler.load_state_dict(state["scaler"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        for epochs in range(len(self.epochs)):  # one division after the other: the same rate to the last bit
            self.step_rate(epochs + 1)
        if self.layout.parts.rank < len(state["rng"]):  # else there were fewer processes, and this stream is new
            self._rng |= state["rng"][self.layout.parts.rank]
        self.losses = state["losses"].tolist()
        self.step, self.seconds, self.waited = state["step"], state["seconds"], state["waited"]

    def step_rate(self, epochs: int) -> None:
        """Divide the learning rate by ten if ``epochs`` call for it; in place where graphs read it from a tensor."""
        if self.lr_step and epochs % self.lr_step == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.1

    def diverged(self, what: str, step: int) -> Diverged:
        """Return the error for what happened at a step of the current epoch."""
        return Diverged(f"{self.title}: {what} in epoch {len(self.epochs) + 1}, step {step}; a smaller --lr may help")
