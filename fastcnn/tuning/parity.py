"""The contract, checked before a candidate is timed: against float64, at most twice stock torch's error.

The candidate runs at the stage's own size; the comparison in float64 takes a few images of the batch, from its first to
its last. So the gradient of the output is zero for the others, and that of the weight is theirs alone. A batch norm in
training is compared whole, with the running statistics that it leaves behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.available import poison
from fastcnn.backend import only_here
from fastcnn.parameters import RECORDS, RUNNING
from fastcnn.tuning.attempts import Attempts, Lost
from fastcnn.tuning.call import setting_of
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import Winner

# The output, and by argument the gradients and the running statistics after the call.
Results = dict[str, Tensor]


class Trial(NamedTuple):
    """A candidate's outcome: its seconds, or why it was not timed."""

    candidate: Winner
    seconds: float | None = None
    parity: float = 0.0  # the largest error as a part of what is allowed
    problem: str = ""  # it does not serve the stage
    refused: str = ""  # it serves it wrongly, or does not run

    @property
    def is_sound(self) -> bool:
        """Whether it may be timed."""
        return not (self.problem or self.refused)


class Expected(NamedTuple):
    """The results that a candidate must match, on one draw of tensors."""

    tensors: dict[str, Tensor]
    cotangent: Tensor | None
    rows: list[int]
    stock: Results
    exact: Results


class Reference:
    """Stock torch's results for a stage and float64's, made once for all candidates.

    The output is compared on the call's `own` tensors where they are given, gradients on drawn ones. So many `images`
    are compared in float64, a row each for a linear layer. `poison` fills what is allocated with NaN, which changes a
    setting of the whole process meanwhile.
    """

    def __init__(
        self,
        stage: Stage,
        device: torch.device,
        *,
        own: dict[str, Tensor] | None = None,
        gradients: bool = True,
        images: int = 4,
        poison: bool = True,
    ) -> None:
        self.stage, self._images = stage, images
        self._memory: Any = _poisoned if poison else nullcontext
        # Values of full precision for the output, but not in TF32, to which an algorithm may round in more than one
        # way; for gradients such as leave no winner or sign to chance.
        computed_in = stage.tensors["weight" if RECORDS[stage.op].normalizes else "input"].dtype
        in_tf32 = computed_in == torch.float32 and setting_of(stage.op, device.type) == "tf32"
        full = stage.draw(device, rounded=in_tf32) if own is None else own
        with only_here("torch"), self._memory():
            self._draws = [self._expect(full, gradients=False)]
            if stage.trains and gradients:
                self._draws.append(self._expect(stage.draw(device, rounded=True), gradients=True))

    def _expect(self, tensors: dict[str, Tensor], *, gradients: bool) -> Expected:
        stage = self.stage
        count = tensors["input"].shape[0]
        few = {round(i * (count - 1) / (self._images - 1)) for i in range(self._images)}
        rows = list(range(count)) if stage.by_batch else sorted(few)
        stock = _run(stage, tensors, None)
        cotangent, output = None, stock["output"]
        if gradients:
            cotangent = torch.zeros_like(output)
            generator = torch.Generator(output.device).manual_seed(1)
            some_rows = torch.empty_like(output[rows]).normal_(generator=generator)
            cotangent[rows] = some_rows.mul(4).round().clamp(-8, 8) / 4
            stock = _run(stage, tensors, cotangent)
        some = {name: each[rows] if name in stage.activations else each for name, each in tensors.items()}
        wide = {name: _widened(each) for name, each in some.items()}
        exact = _run(stage, wide, None if cotangent is None else cotangent[rows].double())
        return Expected(tensors, cotangent, rows, stock, exact)

    def compare(self, candidate: Winner) -> tuple[float, str]:
        """Return the largest error of a candidate as a part of what is allowed, and what is wrong if something is."""
        with only_here(*candidate), self._memory():
            held = [
                _hold(name, value, draw, self.stage.activations)
                for draw in self._draws
                for name, value in _run(self.stage, draw.tensors, draw.cotangent).items()
            ]
        return max(part for part, _ in held), "; ".join(dict.fromkeys(problem for _, problem in held if problem))


def check(
    reference: Reference, candidate: Winner, attempts: Attempts | None = None, raises: type[Exception] = Lost
) -> Trial:
    """Check the parity of a candidate, with a note in `attempts` meanwhile; Lost and what it `raises` come out."""
    if attempts and (ended := attempts.problem(reference.stage, candidate)):
        return Trial(candidate, refused=ended)
    try:
        with attempts.under_way(reference.stage, candidate) if attempts else nullcontext():
            part, wrong = reference.compare(candidate)
    except (Lost, raises):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if f"backend {candidate.backend!r}" in said:  # it takes no such arguments
            return Trial(candidate, problem=said)
        return Trial(candidate, refused=f"{type(error).__name__}: {said}")  # no memory, or a compiler's
    return Trial(candidate, parity=part, refused=wrong)


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; bytes, which mean 0 to 1, stay."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _run(stage: Stage, tensors: dict[str, Tensor], cotangent: Tensor | None) -> Results:
    """Return what a call gives; the running statistics it updates are copies."""
    running = {name: tensors[name].clone() for name in RECORDS[stage.op].named(RUNNING) if name in tensors}
    with torch.set_grad_enabled(cotangent is not None):
        output = stage.call(tensors | running)
    results = {"output": output.detach()} | {f"{name} after the call": each for name, each in running.items()}
    if cotangent is None:
        return results
    leaves = {name: each for name, each in tensors.items() if each.requires_grad}
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return results | {f"gradient of {name}": each for name, each in zip(leaves, gradients)}


def _hold(name: str, mine: Tensor, draw: Expected, activations: tuple[str, ...]) -> tuple[float, str]:
    theirs, truth = draw.stock[name], draw.exact[name]
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape or strides(mine) != strides(theirs):
        got = f"{mine.dtype} {tuple(mine.shape)}, strides {mine.stride()}"
        return float("inf"), f"{name}: {got}, stock {theirs.dtype} {tuple(theirs.shape)}, strides {theirs.stride()}"
    if not mine.isfinite().all():
        return float("inf"), f"{name}: values that are not finite"
    if name in ("output", *(f"gradient of {each}" for each in activations)):
        mine, theirs = mine[draw.rows], theirs[draw.rows]
    error, allowed = errors(mine, theirs, truth)
    return error / allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}" if error > allowed else ""


def errors(mine: Tensor, theirs: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the largest error of a result, and the largest allowed: twice stock's and one unit in the last place."""
    error = (mine.double() - truth).abs().max().item()
    return error, 2 * (theirs.double() - truth).abs().max().item() + last_place(truth, mine.dtype)


def strides(tensor: Tensor) -> list[int]:
    """Return the strides of the axes that have more than one place; the others' carry no meaning."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def last_place(values: Tensor, dtype: torch.dtype) -> float:
    """Return one unit in the last place of the largest value."""
    limits = torch.finfo(dtype)
    largest = values.abs().max().item() if values.numel() else 0.0
    return limits.eps * 2.0 ** torch.tensor(max(largest, limits.tiny)).log2().floor().item()


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill what is allocated with NaN, so that nothing unwritten passes."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    poisoned = poison(True)
    try:
        yield
    finally:
        poison(poisoned)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
