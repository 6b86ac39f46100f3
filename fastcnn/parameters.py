"""The record of each op: its parameters by name. ops/record.py fills it; route, tables and tuning read it."""

from typing import NamedTuple

# What a parameter is. Tensors:
ACTIVATION = "activation"
WEIGHT = "weight"
BIAS = "bias"  # its shape follows from the others'
RUNNING = "running statistics"  # which a call in training updates
CONSTANT = "constant"  # a tensor or numbers; the values do not change the time
TENSORS = (ACTIVATION, WEIGHT, BIAS, RUNNING, CONSTANT)
# And others:
PAIR = "pair"  # one number, or (rows, columns)
SETTING = "setting"
FREE = "free"  # a setting that does not change the time


class Parameter(NamedTuple):
    """A parameter of an op's function; None means the value of the parameter `stands_for`, if there is one."""

    name: str
    kind: str
    stands_for: str = ""


class Record(NamedTuple):
    """An op: the name of its public function, the function's parameters in order, and the backends of its kernels.

    `product` names torch's switch for float32 in the op's product, ``conv`` or ``matmul``; empty: it has no product,
    and so no autocast. `tuned`: whether it has entries in tuning tables.
    """

    function: str
    parameters: tuple[Parameter, ...]
    backends: tuple[str, ...]
    product: str
    tuned: bool

    @property
    def takes_images(self) -> bool:
        """Whether its input is (N, C, H, W) or, of one image, (C, H, W)."""
        return self.product == "conv" or self.function == "max_pool2d"

    @property
    def normalizes(self) -> bool:
        """Whether its kernels normalize images on their way."""
        return self.tuned and bool(self.named(CONSTANT))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters."""
        return tuple(each.name for each in self.parameters)

    def named(self, *kinds: str) -> tuple[str, ...]:
        """Return the names of the parameters of some kinds."""
        return tuple(each.name for each in self.parameters if each.kind in kinds)


RECORDS: dict[str, Record] = {}  # by stem
