"""Classes whose forward is rewritten: subclasses of the network's own, in name and print the same."""

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from fastcnn import stages as fused_stages
from fastcnn.calls import Call, add, add_to, call, method
from fastcnn.rewrite.analysis import SEQUENTIAL, STOCK, Method, Plan, function_of, is_super, own_name, rewriter_of
from fastcnn.rewrite.chains import ADD, ADD_TO, CALL, MAKERS, METHOD, RUN
from fastcnn.rewrite.source import Unreadable, build, definition


def _add_to(maker: Any, other: Any) -> Call:
    """Return the call ``input += other`` but for its input, which `maker` has made."""
    return add_to(fused_stages.role_of(maker) in MAKERS, other)


_HELPERS = {RUN: fused_stages.run_layers, CALL: call, METHOD: method, ADD: add, ADD_TO: _add_to}
_classes: dict[tuple[type[nn.Module], Plan], type[nn.Module]] = {}


def inherits_rewritten(kind: type[nn.Module]) -> bool:
    """Whether a class has been derived from a rewritten one, as parametrizations and FSDP do."""
    return any(STOCK in vars(each) for each in kind.__mro__[1:])


def rewritten_class(stock: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """Return the subclass of `stock` with the methods of a plan rewritten; one class for each plan."""
    if (stock, plan) not in _classes:
        _classes[stock, plan] = _make(stock, plan)
    return _classes[stock, plan]


def _make(stock: type[nn.Module], plan: Plan) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickle and copy the module as one of its stock class, to be made a rewritten one again."""
        reduced: Any = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made:
            return reduced
        function, arguments, *rest = reduced
        arguments = tuple(stock if each is made else each for each in arguments)
        return restore, (stock if function is made else function, arguments, plan), *rest

    body = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": reduce,
        STOCK: stock,
    }
    methods = {method.attribute: _rewritten(stock, method) for method in plan}
    metaclass: Any = type(stock)
    made: type[nn.Module] = metaclass(stock.__name__, (stock,), body | methods)
    return made


def _rewritten(stock: type[nn.Module], planned: Method) -> Callable[..., Any]:
    if planned == SEQUENTIAL:
        return _sequential_forward
    function = function_of(stock, planned)
    node, place = definition(function)
    tree = rewriter_of(function, node, dict(planned.callees)).rewritten()
    inherited = dict(planned.inherited)
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute) and is_super(each) and each.attr in inherited:
            each.value = ast.copy_location(ast.Name(own_name(tree), ast.Load()), each.value)
            each.attr = inherited[each.attr]
    return build(function, tree, place, _HELPERS)


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    return fused_stages.run_layers(input, *self)


def restore(function: Callable[..., nn.Module], arguments: tuple[Any, ...], plan: Plan) -> nn.Module:
    """Make what a pickle or a copy begins with; without the source that was rewritten it runs unfused."""
    module = function(*arguments)
    try:
        module.__class__ = rewritten_class(type(module), plan)
    except Unreadable:
        return module
    return module
