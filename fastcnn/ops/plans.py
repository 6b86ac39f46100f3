"""Plans for the front: what it keeps of a kind of call, made at the first one by the op's checks and route."""

from typing import Any

from torch import Tensor

from fastcnn.ops import checks
from fastcnn.ops.convolution import Convolution, output_shape
from fastcnn.shapes import LRN, BatchNorm, Window

Plan = dict[str, Any] | None


def plan(op: Any, *arguments: Any) -> Plan:
    """Return the plan of a call, as csrc/front/plan.h reads it, or None for the Python path."""
    route, prepared = op.route(arguments)
    try:
        prepared = prepared or op.prepare(*arguments)
    except (TypeError, ValueError, RuntimeError):  # the stock layers themselves are to say what is wrong
        return None
    input, images = arguments[0], prepared[0]
    found: dict[str, Any] = {"backend": "torch"}
    size = input.shape[-2:]
    for each in prepared:
        if isinstance(each, Convolution):
            weight, settings = prepared[1], each.running(route.algorithm) if route.algorithm else each
            if settings.dgrad is not None or settings.wgrad is not None:
                return None  # gradients by our kernels, which neighbours share
            found["convolution"], found["algorithm"] = settings.operands()
            size = output_shape(images, weight, settings.window(weight))[1:]
        elif isinstance(each, BatchNorm):
            found |= {"training": each.training, "constants": (float(each.momentum), each.eps)}
        elif isinstance(each, LRN):
            if input.numel() == 0 or checks.refuse_constants(**each._asdict()):
                return None
            found |= {"size": int(each.size), "constants": tuple(map(float, each[1:]))}
        elif isinstance(each, Window):
            found |= {"window": each.numbers(), "height": size[0], "width": size[1]}
    indices, padded = op.stem == "max_pool" and bool(arguments[-1]), images.shape != input.shape
    if op.runs_stock(route, arguments):
        return found | {"indices": indices, "padding": "same" if padded else ""}
    if indices or padded:
        return None  # Python makes indices of the kernel's codes, and pads an input by hand
    given, taken = ([each.dtype for each in row if isinstance(each, Tensor)] for row in (arguments, prepared))
    cast = images.dtype if given != taken else None  # by autocast
    found |= {"backend": route.backend, "batched": input.dim() == 4, "cast": cast}
    pooled = {name: found[name] for name in ("height", "width") if name in found}
    return found | {"derive": op.derivative(route.backend, prepared, before=None, **pooled)}
