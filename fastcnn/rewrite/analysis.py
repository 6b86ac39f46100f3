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


class Method(NamedTuple):
    """All that rewriting a method depends on."""

    name: str
    callees: frozenset[tuple[str, Callee]] = frozenset()
    place: int | None = None  # in the class's __mro__, of whose method it is where `super` finds it
    inherited: frozenset[tuple[str, str]] = frozenset()  # the attribute that stands for each ``super().<name>``

    @property
    def attribute(self) -> str:
        """The name under which the rewritten method is found."""
        return self.name if self.place is None else f"_fastcnn_{self.place}_{self.name}"


Plan = tuple[Method, ...]

SEQUENTIAL = Method("forward", frozenset({("", Callee("layers", None))}))  # what nn.Sequential inherits to others
_OURS = ("torch.nn.", "fastcnn.nn")  # modules whose forwards are known
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
    if (kind.forward.__module__ or "").startswith(_OURS):
        inherited = issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward
        return Analysis((SEQUENTIAL,) if inherited and _has_stage(tuple(module.children())) else ())
    if reason := _left_alone(module, kind):
        return Analysis((), reason=reason)
    methods: list[Method] = []
    staged: set[str] = set()
    reasons: list[str] = []
    found: list[Found] = []
    chains: list[tuple[str, ...]] = []
    layers: dict[str, nn.Module] = {}
    try:
        for method, function, node in _methods(module, kind, reasons):
            callees, values = _callees(function, node, module)
            layers |= values
            rewriter = rewriter_of(function, node, callees)
            rewriter.rewritten()
            chains += [tuple(link.text for link in chain) for chain in rewriter.chains]
            methods.append(method._replace(callees=frozenset(callees.items())))
            if rewriter.found:
                staged.add(method.attribute)
                found += rewriter.found
    except Unreadable as error:
        return Analysis((), reason=str(error))
    plan = _needed(methods, staged)
    return Analysis(plan, tuple(found), tuple(chains), "" if plan else "; ".join(reasons), layers)


def _needed(methods: list[Method], staged: set[str]) -> Plan:
    """Return the methods in which there are stages, and those that call them by `super`."""
    needed, more = set[str](), staged
    while more:
        needed |= more
        more = {each.attribute for each in methods if needed.intersection(dict(each.inherited).values())} - needed
    return tuple(
        each._replace(inherited=frozenset(pair for pair in each.inherited if pair[1] in needed))
        for each in methods
        if each.attribute in needed
    )


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


def _methods(
    module: nn.Module, kind: type[nn.Module], reasons: list[str]
) -> Iterator[tuple[Method, Any, ast.FunctionDef]]:
    """Yield forward, and the methods that it calls on the module or inherits, and so on, as far as they can be read."""
    waiting, seen = [Method("forward")], set()
    while waiting:
        method = waiting.pop(0)
        function = function_of(kind, method)
        if method in seen or not callable(function) or isinstance(function, type):
            continue
        if method.place is None and method.name in module.__dict__:
            continue
        seen.add(method)
        try:
            node = _readable(function, method.name)
        except Unreadable as error:
            if method == Method("forward"):
                raise
            if method.place is not None:
                reasons.append(f"it calls super().{method.name}, which is not followed: {error}")
            continue
        owner = own_name(node)
        called = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
        waiting += [Method(each.attr) for each in called if _is(each.value, owner)]
        inherited = [Method(each.attr, place=_place(kind, function, each.attr)) for each in called if is_super(each)]
        inherited = [each for each in inherited if each.place is not None]
        waiting += inherited
        yield method._replace(inherited=frozenset((each.name, each.attribute) for each in inherited)), function, node


def function_of(kind: type[nn.Module], method: Method) -> Any:
    """Return the function that a method is in a class, or None."""
    if method.place is None:
        return inspect.getattr_static(kind, method.name, None)
    return vars(kind.__mro__[method.place])[method.name]


def _readable(function: Any, name: str) -> ast.FunctionDef:
    node, _ = definition(function)
    if node.name != name:
        raise Unreadable(f"its {name} is a function named {node.name}, as a decorator makes")
    if looks := _names_of(function.__code__) & _LOOK_AT_VARIABLES:
        raise Unreadable(f"its {name} may look at its own variables, by {min(looks)}")
    return node


def is_super(node: ast.Attribute) -> bool:
    """Whether an attribute is ``super().<name>``."""
    called = node.value
    return isinstance(called, ast.Call) and _is(called.func, "super") and not (called.args or called.keywords)


def _place(kind: type[nn.Module], function: FunctionType, name: str) -> int | None:
    """Return the place of the class whose method ``super().<name>`` is, but for torch's own and ours."""
    around = _variables_around(function)
    order, owner = kind.__mro__, around.get("__class__")
    if owner not in order or "super" in around or "super" in function.__code__.co_varnames:
        return None
    for i in range(order.index(owner) + 1, len(order)):
        if name in vars(order[i]):
            return None if order[i].__module__.startswith(_OURS) else i
    return None


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


def own_name(node: ast.FunctionDef) -> str:
    """Return what a method calls the module."""
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
    owner = own_name(node)
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
