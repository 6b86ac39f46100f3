"""What a module's own forward calls, in a row or not, and which stages can be made of it."""

import ast
import inspect
import operator
from abc import ABCMeta
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

from fastcnn import stages as fused_stages
from fastcnn.calls import FUNCTIONS
from fastcnn.rewrite.chains import ANY, Callee, Found, Link, Rewriter
from fastcnn.rewrite.source import Unreadable, definition

# A method's name and what its callees are: all that rewriting it depends on.
Method = tuple[str, frozenset[tuple[str, Callee]]]
Plan = tuple[Method, ...]

SEQUENTIAL: Method = ("forward", frozenset({("self", Callee("layers", None))}))  # the forward of nn.Sequential
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_LOOK_AT_VARIABLES = frozenset({"locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe"})
_ROWS = (nn.Sequential, nn.ModuleList)


class Analysis(NamedTuple):
    """A module's plan, empty where nothing can be fused: then `reason` says why, where there is more to say."""

    plan: Plan
    found: tuple[Found, ...] = ()
    chains: tuple[tuple[str, ...], ...] = ()  # the callees of each chain, stage or not
    reason: str = ""
    layers: dict[str, nn.Module] = {}  # by the expression that calls them


STOCK = "_fastcnn_stock"


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a rewritten one was made of, or the class itself."""
    stock: type[nn.Module] = vars(kind).get(STOCK, kind)
    return stock


def analyse(module: nn.Module) -> Analysis:
    """Find the stages in what a module's forward calls; the module is only looked at."""
    kind = stock_class(type(module))
    if (kind.forward.__module__ or "").startswith(("torch.nn.", "fastcnn.nn")):
        inherited = issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward
        return Analysis((SEQUENTIAL,) if inherited and _has_stage(tuple(module.children())) else ())
    if reason := _left_alone(module, kind):
        return Analysis((), reason=reason)
    plan: list[Method] = []
    found: list[Found] = []
    chains: list[tuple[str, ...]] = []
    layers: dict[str, nn.Module] = {}
    try:
        for name, function, node in _methods(module, kind):
            callees, values = _callees(function, node, module)
            layers |= values
            rewriter = rewriter_of(function, node, callees)
            rewriter.rewritten()
            chains += [tuple(link.text for link in chain) for chain in rewriter.chains]
            if rewriter.found:
                plan.append((name, frozenset(callees.items())))
                found += rewriter.found
    except Unreadable as error:
        return Analysis((), reason=str(error))
    return Analysis(tuple(plan), tuple(found), tuple(chains), layers=layers)


def _left_alone(module: nn.Module, kind: type[nn.Module]) -> str:
    """Say why a module's class is not touched, or return an empty string."""
    if isinstance(module, fx.GraphModule):
        return "it is a graph of torch.fx: fuse the model before it is traced"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if type(kind) not in (type, ABCMeta):
        return f"its class is made by a metaclass, {type(kind).__name__}"
    if getattr(kind.__init_subclass__, "__func__", None) is not None:
        return "its class takes part in the making of subclasses (__init_subclass__)"
    return ""


def _methods(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any, ast.FunctionDef]]:
    """Yield forward, and the methods that it calls on the module, and so on, as far as they can be read."""
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop(0)
        function = inspect.getattr_static(kind, name, None)
        if name in seen or name in module.__dict__ or not callable(function) or isinstance(function, type):
            continue
        seen.add(name)
        try:
            node, _ = definition(function)
            if node.name != name:
                raise Unreadable(f"its {name} is a function named {node.name}, as a decorator makes")
            if looks := _names_of(function.__code__) & _LOOK_AT_VARIABLES:
                raise Unreadable(f"its {name} may look at its own variables, by {min(looks)}")
        except Unreadable:
            if name == "forward":
                raise
            continue
        owner = _own_name(node)
        waiting += [each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and _is(each.value, owner)]
        yield name, function, node


def _names_of(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function uses, with those of the functions in it."""
    inner = [_names_of(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def rewriter_of(function: FunctionType, node: ast.FunctionDef, callees: dict[str, Callee]) -> Rewriter:
    """Return what rewrites a function whose callees are known."""
    code = function.__code__
    deleted = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Del)}
    plain = frozenset(code.co_varnames) - set(code.co_cellvars) - deleted
    return Rewriter(node, plain, callees, stage_roles)


def stage_roles(links: list[Link], start: int) -> tuple[str, ...] | None:
    """Return the roles of the stage that begins at a link; a layer alone is no stage, as it runs as it is."""
    for stage in fused_stages.STAGES:
        span = links[start : start + len(stage.roles)]
        pairs = [(link.role, role) for link, role in zip(span, stage.roles)]
        if len(span) < len(stage.roles) or not all(given in (role, ANY) for given, role in pairs):
            continue
        if all(given == ANY for given, _ in pairs) or (len(span) == 1 and span[0].is_layer):
            continue
        return stage.roles
    return None


def role_of(layer: Any) -> str | None:
    """Return the role of a layer by its class, whatever hooks it has now."""
    return fused_stages.ROLES.get(getattr(type(layer), "forward", None))


def _has_stage(layers: tuple[nn.Module, ...]) -> bool:
    roles = tuple(map(role_of, layers))
    return any(fused_stages.stage_at(roles, start) for start in range(len(roles)))


def _own_name(node: ast.FunctionDef) -> str:
    arguments = [*node.args.posonlyargs, *node.args.args]
    if not arguments:
        raise Unreadable("its forward takes no self")
    return arguments[0].arg


def _callees(
    function: FunctionType, node: ast.FunctionDef, module: nn.Module
) -> tuple[dict[str, Callee], dict[str, nn.Module]]:
    """Return what the callees and the iterables of a function stand for, as far as the module alone tells, and which
    of them are modules.
    """
    owner = _own_name(node)
    if any(isinstance(n, ast.Name) and n.id == owner and not isinstance(n.ctx, ast.Load) for n in ast.walk(node)):
        raise Unreadable(f"its forward changes {owner}")
    known = {owner: module} | _variables_around(function)
    own = {owner, *function.__code__.co_freevars}
    others = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars)
    callees: dict[str, Callee] = {}
    layers: dict[str, nn.Module] = {}
    for each in ast.walk(node):
        place = each.func if isinstance(each, ast.Call) else each.iter if isinstance(each, ast.For) else None
        if place is None or any(isinstance(n, ast.Name) and n.id in others - own for n in ast.walk(place)):
            continue
        value = _value(place, known)
        if isinstance(value, nn.Module):
            layers[ast.unparse(place)] = value
        if callee := _callee(value, loop=isinstance(each, ast.For)):
            callees[ast.unparse(place)] = callee
    return callees, layers


def _variables_around(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    around: dict[str, Any] = {}
    for name, cell in cells:
        try:
            around[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return function.__globals__ | around


def _value(place: ast.expr, known: dict[str, Any]) -> Any:
    """Return what an expression of names, attributes and constant indices stands for, or None."""
    if isinstance(place, ast.Name):
        return known.get(place.id)
    if isinstance(place, ast.Attribute):
        owner = _value(place.value, known)
        if owner is None or isinstance(inspect.getattr_static(type(owner), place.attr, None), property):
            return None
        return getattr(owner, place.attr, None)
    if isinstance(place, ast.Subscript) and isinstance(place.slice, ast.Constant):
        holder, index = _value(place.value, known), place.slice.value
        if not isinstance(holder, (*_CONTAINERS, list, tuple, dict)):
            return None
        try:
            return operator.getitem(holder, index)  # type: ignore[misc]
        except (LookupError, TypeError):
            return None
    return None


def _callee(value: Any, *, loop: bool) -> Callee | None:
    if loop:
        stock = isinstance(value, _ROWS) and type(value).__iter__ in [each.__iter__ for each in _ROWS]
        return Callee("layers", None) if stock else None
    if isinstance(value, nn.Module):
        return Callee("layer", role_of(value))
    try:
        known = FUNCTIONS.get(value)
    except TypeError:  # not hashable
        return None
    return Callee("function", known[0]) if known else None
