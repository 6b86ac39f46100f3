"""Stages: layers in a row, and the function that runs them as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook

from fastcnn import functional as FF
from fastcnn import turning
from fastcnn.calls import BatchNorm, Call
from fastcnn.normalization import Normalize, is_recorded
from fastcnn.ops.folding import folded, folds
from fastcnn.ops.gradients import only_reader
from fastcnn.ops.normalize_conv_relu import normalize_conv_relu
from fastcnn.ops.normalize_conv_relu_pool import normalize_conv_relu_pool
from fastcnn.roles import BLOCK, IDENTITY, ROW, roles_of


def conv_arguments(input: Any, conv: nn.Conv2d) -> tuple[Any, ...]:
    """Return the arguments of ``functional.conv2d_relu``, the input padded already unless the padding is zeros."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":  # nn.Conv2d pads in a step of its own too
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    weight, bias = _parameters(conv)
    return input, turning.weight_of(weight), bias, conv.stride, padding, conv.dilation, conv.groups


def _parameters(layer: Any) -> tuple[Any, Any]:
    """Return weight and bias from the layer's dictionary: `nn.Module.__getattr__` takes half a microsecond for each."""
    own = layer.__dict__["_parameters"]
    if type(layer) in _OWN_PARAMETERS and "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return layer.weight, layer.bias


_OWN_PARAMETERS = frozenset({nn.Conv2d, nn.Linear})  # subclasses may compute these attributes


def _pool_keywords(pool: nn.MaxPool2d) -> dict[str, Any]:
    return {
        "pool_size": pool.kernel_size,
        "pool_stride": pool.stride,
        "pool_padding": pool.padding,
        "pool_ceil_mode": pool.ceil_mode,
    }


def run_conv_relu(input: Any, conv: nn.Conv2d, _relu: nn.Module | None = None) -> Any:
    """Run a convolution and a ReLU as one."""
    return FF.conv2d_relu(*conv_arguments(input, conv))


def _conv_relu_pool(input: Any, conv: nn.Conv2d, _relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    return FF.conv2d_relu_max_pool2d(*conv_arguments(input, conv), **_pool_keywords(pool))


def _normalize_conv_relu(input: Any, normalize: Normalize, conv: nn.Conv2d, relu: nn.Module) -> Any:
    if conv.padding_mode != "zeros":  # then the normalized images are padded, in a step of their own
        return run_conv_relu(normalize(input), conv, relu)
    return normalize_conv_relu(*normalize.arguments(input), *conv_arguments(input, conv)[1:])


def _normalize_conv_relu_pool(
    input: Any, normalize: Normalize, conv: nn.Conv2d, relu: nn.Module, pool: nn.MaxPool2d
) -> Any:
    if conv.padding_mode != "zeros":
        return _conv_relu_pool(normalize(input), conv, relu, pool)
    settings = *conv_arguments(input, conv)[1:], *_pool_keywords(pool).values()
    return normalize_conv_relu_pool(*normalize.arguments(input), *settings)


def _bn_arguments(bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Return the arguments after the input that the layer's forward gives F.batch_norm; count the batch as it does."""
    tracks = bn.training and bn.track_running_stats
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # the average over all batches
            momentum = 1.0 / float(bn.num_batches_tracked)
    running = (bn.running_mean, bn.running_var) if tracks or not bn.training else (None, None)
    return *running, bn.weight, bn.bias, _uses_own_statistics(bn), momentum, bn.eps


def _uses_own_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _bn_relu(input: Any, bn: nn.BatchNorm2d, _relu: nn.Module | None = None) -> Any:
    bn._check_input_dim(input)
    return FF.batch_norm_relu(input, *_bn_arguments(bn))


def _bn_relu_pool(input: Any, bn: nn.BatchNorm2d, _relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    bn._check_input_dim(input)
    return FF.batch_norm_relu_max_pool2d(input, *_bn_arguments(bn), **_pool_keywords(pool))


def _norm_relu(input: Any, norm: BatchNorm, _relu: Any) -> Any:
    return FF.batch_norm_relu(input, *norm)


def _norm_relu_pool(input: Any, norm: BatchNorm, _relu: Any, pool: Any) -> Any:
    return FF.batch_norm_relu_max_pool2d(input, *norm, **_pool_keywords(pool))


def _folds(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> bool:
    """Whether the batch norm is constant and can be folded into the convolution."""
    if _uses_own_statistics(bn) or not isinstance(input, Tensor) or input.dim() != 4:
        return False
    return folds(input, conv.stride, *_parameters(conv), *_parameters(bn))


def _folded_arguments(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    input, weight, bias, *settings = conv_arguments(input, conv)
    return input, *folded(weight, bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps), *settings


def _conv_bn(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Any:
    if _folds(input, conv, bn):
        return F.conv2d(*_folded_arguments(input, conv, bn))
    return bn(F.conv2d(*conv_arguments(input, conv)))


def _conv_bn_relu(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: nn.Module | None = None) -> Any:
    if _folds(input, conv, bn):
        return FF.conv2d_relu(*_folded_arguments(input, conv, bn))
    return _bn_relu(F.conv2d(*conv_arguments(input, conv)), bn, relu)


def _conv_bn_relu_pool(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    if _folds(input, conv, bn):
        return FF.conv2d_relu_max_pool2d(*_folded_arguments(input, conv, bn), **_pool_keywords(pool))
    return _bn_relu_pool(F.conv2d(*conv_arguments(input, conv)), bn, relu, pool)


def _sum_relu(input: Any, addition: Any, _relu: Any) -> Any:
    other = addition.other
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return F.relu(input + other)
    if addition.in_place and (input.shape != other.shape or input.dtype != other.dtype):
        return F.relu(input.add_(other))  # add_ keeps the shape and dtype of the input
    return FF.add_relu(input, other)


def _lrn(input: Any, lrn: nn.LocalResponseNorm) -> Any:
    return FF.local_response_norm(input, lrn.size, lrn.alpha, lrn.beta, lrn.k)


def _lrn_pool(input: Any, lrn: nn.LocalResponseNorm, pool: nn.MaxPool2d) -> Any:
    return FF.local_response_norm_max_pool2d(input, lrn.size, lrn.alpha, lrn.beta, lrn.k, **_pool_keywords(pool))


def _max_pool(input: Any, pool: nn.MaxPool2d) -> Any:
    window = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    return FF.max_pool2d(input, *window, pool.ceil_mode, pool.return_indices)


def _linear_relu(input: Any, linear: nn.Linear, _relu: nn.Module) -> Any:
    return FF.linear_relu(input, *_parameters(linear))


def _linear_relu_dropout(input: Any, linear: nn.Linear, _relu: nn.Module, dropout: nn.Dropout) -> Any:
    return FF.linear_relu_dropout(input, *_parameters(linear), dropout.p, dropout.training)


class Stage(NamedTuple):
    """Children in a row, by role, and the function that runs them as one."""

    roles: tuple[str, ...]
    run: Callable[..., Any]


_CONV_RELU = Stage(("conv", "relu"), run_conv_relu)
_CONV_RELU_POOL = Stage(("conv", "relu", "pool"), _conv_relu_pool)
_CONV_BN_RELU = Stage(("conv", "bn", "relu"), _conv_bn_relu)
_CONV_BN_RELU_POOL = Stage(("conv", "bn", "relu", "pool"), _conv_bn_relu_pool)
_LRN = Stage(("lrn",), _lrn)
_LRN_POOL = Stage(("lrn", "pool"), _lrn_pool)
_POOL = Stage(("pool",), _max_pool)
STAGES = (  # the first match counts: of two that can match, the longer comes first; otherwise the more usual one
    _CONV_RELU_POOL,
    _CONV_RELU,
    Stage(("normalize", "conv", "relu", "pool"), _normalize_conv_relu_pool),
    Stage(("normalize", "conv", "relu"), _normalize_conv_relu),
    _CONV_BN_RELU_POOL,
    _CONV_BN_RELU,
    Stage(("conv", "bn"), _conv_bn),
    Stage(("bn", "relu", "pool"), _bn_relu_pool),
    Stage(("bn", "relu"), _bn_relu),
    Stage(("batch_norm", "relu", "pool"), _norm_relu_pool),
    Stage(("batch_norm", "relu"), _norm_relu),
    _LRN_POOL,
    _LRN,
    _POOL,
    Stage(("lone pool",), _max_pool),
    Stage(("linear", "relu", "dropout"), _linear_relu_dropout),
    Stage(("linear", "relu"), _linear_relu),
    Stage(("add", "relu"), _sum_relu),
)
_CONVOLUTIONS = (_CONV_RELU, _CONV_RELU_POOL, _CONV_BN_RELU, _CONV_BN_RELU_POOL)
_IN_EITHER_LAYOUT = (*_CONVOLUTIONS, _LRN, _LRN_POOL, _POOL)  # on the CPU no slower in channels_last

_BEGINNING: dict[str | None, list[Stage]] = {  # by their first role
    role: [stage for stage in STAGES if stage.roles[0] == role] for role in {each.roles[0] for each in STAGES}
}

# A function called instead of a stage's function, with the roles, that function, the input and the layers.
Around = Callable[[tuple[str, ...], Callable[..., Any], Any, tuple[Any, ...]], Any]
_around: Around | None = None


@contextmanager
def noting(around: Around) -> Iterator[None]:
    """While the block runs, call `around` for every stage instead of the stage's function."""
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before


def _run(stage: Stage, input: Any, layers: tuple[Any, ...]) -> Any:
    return stage.run(input, *layers) if _around is None else _around(stage.roles, stage.run, input, layers)


def run_lrn(input: Any, lrn: nn.LocalResponseNorm) -> Any:
    """Run a local response normalization."""
    return _run(_LRN, input, (lrn,))


def run_max_pool(input: Any, pool: nn.MaxPool2d) -> Any:
    """Run a max-pool."""
    return _run(_POOL, input, (pool,))


def run_layers(input: Any, *layers: Any) -> Any:
    """Run layers and calls of functions in order, fused where they form stages; rewritten forwards call this."""
    if not (is_recorded(input) or _has_any_global_hook()):
        return run_stages(input, layers, tuple(map(_settings, layers)))
    for layer in layers:
        input = layer(input)
    return input


def run_stages(input: Any, layers: tuple[Any, ...], settings: tuple[Any, ...]) -> Any:
    """Run layers in order, each stage as one call; `settings` are the layers, but for calls their settings."""
    layers, settings, roles = _taken_in(layers, settings)
    if is_dynamo_compiling():
        return _run_parts(input, _parts(roles), layers, settings)
    try:
        parts, end_turned = _plans[roles]
    except KeyError:
        parts, end_turned = _plans[roles] = _plan(roles)
    if end_turned and (convolutions := turning.pays(input, layers[:end_turned])):
        input, parts = _run_turned(input, parts, layers, settings, convolutions)
    return _run_parts(input, parts, layers, settings)


def _taken_in(layers: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, Any, tuple[str | None, ...]]:
    """Replace rows among layers by their children, leave out what does nothing, and return the roles too."""
    roles = roles_of(layers)
    while ROW in roles:
        layers, settings = (
            tuple(one for each, role in zip(row, roles) for one in (each._modules.values() if role == ROW else (each,)))
            for row in (layers, settings)
        )
        roles = roles_of(layers)
    if IDENTITY in roles:
        kept = [place for place, role in enumerate(roles) if role != IDENTITY]
        layers, settings, roles = (tuple(row[place] for place in kept) for row in (layers, settings, roles))
    return layers, settings, roles


def _run_parts(input: Any, parts: tuple["Part", ...], layers: tuple[Any, ...], settings: tuple[Any, ...]) -> Any:
    for stage, start, end, reads_alone in parts:
        if stage is None:
            input = layers[start](input)
            continue
        if reads_alone:
            only_reader(input)
        row = settings[start:end]
        input = stage[1](input, *row) if _around is None else _run(stage, input, row)
    return input


def _run_turned(
    input: Tensor,
    parts: tuple["Part", ...],
    layers: tuple[Any, ...],
    settings: tuple[Any, ...],
    convolutions: turning.Convolutions,
) -> tuple[Tensor, tuple["Part", ...]]:
    """Run the first parts in channels_last, as long as it pays, and return their output and the parts that are left."""
    input = turning.turn(input)
    with turning.turned():
        while parts and parts[0].end <= len(convolutions) and turning.pays_still(input, convolutions[parts[0].start]):
            input = _run_parts(input, parts[:1], layers, settings)
            parts = parts[1:]
    return turning.turn_back(input), parts


def _settings(layer: Any) -> Any:
    return layer.settings if type(layer) is Call else layer


class Part(NamedTuple):
    """Consecutive layers of a row that form a stage, or one layer that runs by itself."""

    stage: Stage | None
    start: int
    end: int
    reads_alone: bool  # a convolution that alone reads the output of the conv+ReLU before it


def _parts(roles: tuple[str | None, ...]) -> tuple[Part, ...]:
    """Divide a row of layers, by their roles, into the longest stages."""
    parts: list[Part] = []
    start, before = 0, None
    while start < len(roles):
        rest = roles[start:]
        stage = next((each for each in _BEGINNING.get(rest[0], ()) if rest[: len(each.roles)] == each.roles), None)
        end = start + (len(stage.roles) if stage else 1)
        parts.append(Part(stage, start, end, stage is not None and before is _CONV_RELU and rest[0] == "conv"))
        start, before = end, stage
    return tuple(parts)


def _plan(roles: tuple[str | None, ...]) -> tuple[tuple[Part, ...], int]:
    """Return the parts of a row, and where those end with which it begins and which may run in channels_last.

    These are blocks or two convolutions or more and what lies between; 0 where there are no such.
    """
    parts = _parts(roles)
    leading = tuple(takewhile(lambda part: part.stage in _IN_EITHER_LAYOUT or roles[part.start] == BLOCK, parts))
    convolutions = [part for part in leading if part.stage in _CONVOLUTIONS or part.stage is None]
    if not convolutions or convolutions[0].start > 0 or (len(convolutions) == 1 and convolutions[0].stage):
        return parts, 0
    return parts, leading[-1].end


_plans: dict[tuple[str | None, ...], tuple[tuple[Part, ...], int]] = {}  # of the rows that have run so far


def parts_of(layers: tuple[Any, ...]) -> list[tuple[Stage | None, tuple[Any, ...]]]:
    """Return a row in the parts in which it would run now: stage and layers; the stage of a layer by itself is None."""
    layers, _, roles = _taken_in(layers, layers)
    return [(part.stage, layers[part.start : part.end]) for part in _parts(roles)]
