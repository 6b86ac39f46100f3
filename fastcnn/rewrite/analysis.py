"""What a module's own forward calls, in a row or not, and which stages can be made of it."""

import ast
import inspect
import operator
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

from fastcnn import calls
from fastcnn import nn as fused_nn
from fastcnn import stages as fused_stages
from fastcnn.calls import FUNCTIONS, Call
from fastcnn.instance import is_replaced
from fastcnn.rewrite.chains import Rewriter
from fastcnn.rewrite.links import ADD, ADD_TO, CALL, MAKERS, RUN, Callee, Found, is_name, simple
from fastcnn.rewrite.source import Place, Unreadable, build, definition
from fastcnn.roles import ROLES, ROW
from fastcnn.roles import role_of as running_role


class Method(NamedTuple):
    """A method to be read, by name; one that `super` finds also by the place of its class in the __mro__."""

    name: str
    place: int | None = None

    @property
    def attribute(self) -> str:
        """The name under which the rewritten method is set on the module."""
        return self.name if self.place is None else f"_fastcnn_{self.place}_{self.name}"


class Read(NamedTuple):
    """A method and its syntax tree."""

    attribute: str  # under which the rewritten method is set on the module
    function: Any
    node: ast.FunctionDef
    place: Place
    inherited: dict[str, str]  # the attribute that stands for each ``super().<name>``


_OURS = ("torch.nn.", "fastcnn.nn")  # modules whose forwards are known
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LOOK_AT_VARIABLES = frozenset({"locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe"})
_ROWS = (nn.Sequential, nn.ModuleList)
_UNKNOWN = object()  # the value of an expression that the module's attributes do not decide

# What runs instead of torch's own forwards; captured at import, as a forward patched later is not stock.
_STOCK: dict[Any, Any] = {
    nn.Sequential.forward: fused_nn.Sequential.forward,
    nn.MaxPool2d.forward: fused_nn.MaxPool2d.forward,
    nn.LocalResponseNorm.forward: fused_nn.LocalResponseNorm.forward,
}
_built: dict[Any, FunctionType] = {}


class Analysis(NamedTuple):
    """The methods that `fuse` sets on a module; none if nothing can be fused, and then `reason` may say why."""

    methods: dict[str, FunctionType]
    found: tuple[Found, ...] = ()
    chains: tuple[tuple[str, ...], ...] = ()  # the callees of each chain, stage or not
    reason: str = ""
    layers: dict[str, nn.Module] = {}  # by the expression that calls them
    walked: frozenset[int] = frozenset()  # ids of the rows whose layers are called one by one


def analyse(module: nn.Module) -> Analysis:
    """Find the stages in what a module's forward calls; the module itself is not changed."""
    kind = type(module)
    if is_replaced(module, "forward"):
        return Analysis({}, reason="its forward has been replaced on the instance")
    if kind.forward in _STOCK:
        return Analysis({"forward": _STOCK[kind.forward]})
    if (kind.forward.__module__ or "").startswith(_OURS):
        return Analysis({})
    if isinstance(module, fx.GraphModule):
        return Analysis({}, reason="it is a graph of torch.fx: fuse the model before it is traced")
    reasons: list[str] = []
    read: list[tuple[Read, Rewriter]] = []
    layers: dict[str, nn.Module] = {}
    walked: set[int] = set()
    try:
        for each in _methods(module, kind, reasons):
            known = {_own_name(each.node): module} | _variables_around(each.function)
            callees, values = _callees(each.function, each.node, known)
            layers |= values
            walked |= _walked(each.node, known)
            read.append((each, Rewriter(each.node, each.function.__code__, callees)))
    except Unreadable as error:
        return Analysis({}, reason=str(error))
    needed = _needed(read)
    methods = {each.attribute: _build(each, rewriter, needed) for each, rewriter in read if each.attribute in needed}
    found = tuple(each for _, rewriter in read for each in rewriter.found if each.runs)
    chains = tuple(chain for _, rewriter in read for chain in rewriter.chains)
    walked -= {id(layers[each.texts[0]]) for each in found if not each.roles}
    return Analysis(methods, found, chains, "" if methods else "; ".join(reasons), layers, frozenset(walked))


def is_row(module: nn.Module) -> bool:
    """Whether a module runs its children one after another, as nn.Sequential does."""
    rows = (nn.Sequential.forward, fused_nn.Sequential.forward)
    return type(module).forward in rows and not is_replaced(module, "forward")


def _needed(read: list[tuple[Read, Rewriter]]) -> set[str]:
    """Return the methods in which there are stages, and those that call them by `super`."""
    needed, more = set[str](), {each.attribute for each, rewriter in read if rewriter.found}
    while more:
        needed |= more
        more = {each.attribute for each, _ in read if needed.intersection(each.inherited.values())} - needed
    return needed


def _methods(module: nn.Module, kind: type[nn.Module], reasons: list[str]) -> Iterator[Read]:
    """Yield forward, the methods that it calls on the module or by `super`, those that they call, and so on."""
    waiting, seen = [Method("forward")], set()
    while waiting:
        method = waiting.pop(0)
        name, place = method
        function = inspect.getattr_static(kind if place is None else kind.__mro__[place], name, None)
        if method in seen or not callable(function) or isinstance(function, type):
            continue
        if place is None and is_replaced(module, name):
            continue
        seen.add(method)
        try:
            node, written = _readable(function, name)
        except Unreadable as error:
            if method == Method("forward"):
                raise
            if place is not None:
                reasons.append(f"it calls super().{name}, which is not followed: {error}")
            continue
        called = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
        waiting += [Method(each.attr) for each in called if is_name(each.value, _own_name(node))]
        inherited = {ast.unparse(each): inherited for each in called if (inherited := _inherited(each, kind, function))}
        waiting += inherited.values()
        attributes = {text: each.attribute for text, each in inherited.items()}
        yield Read(method.attribute, function, node, written, attributes)


def _readable(function: Any, name: str) -> tuple[ast.FunctionDef, Place]:
    node, place = definition(function)
    if node.name != name:
        raise Unreadable(f"its {name} is a function named {node.name}, as a decorator makes")
    if looks := _names_of(function.__code__) & _LOOK_AT_VARIABLES:
        raise Unreadable(f"its {name} may read its own variables, by {min(looks)}")
    return node, place


def _inherited(node: ast.Attribute, kind: type[nn.Module], function: FunctionType) -> Method | None:
    """Return the method that ``super().<name>`` or ``super(Net, self).<name>`` is, but for torch's own and ours."""
    called, around = node.value, _variables_around(function)
    if not isinstance(called, ast.Call) or not is_name(called.func, "super") or called.keywords:
        return None
    if "super" in around or "super" in function.__code__.co_varnames:
        return None
    owner = _value(called.args[0], around) if len(called.args) == 2 else around.get("__class__")
    order = kind.__mro__
    if len(called.args) == 1 or owner not in order:
        return None
    if called.args and not is_name(called.args[1], function.__code__.co_varnames[0]):
        return None
    for i in range(order.index(owner) + 1, len(order)):
        if node.attr in vars(order[i]):
            return None if order[i].__module__.startswith(_OURS) else Method(node.attr, place=i)
    return None


def _build(read: Read, rewriter: Rewriter, needed: set[str]) -> FunctionType:
    """Return the function of a rewritten tree; modules whose methods are rewritten alike share one."""
    inherited = {text: attribute for text, attribute in read.inherited.items() if attribute in needed}
    key = read.function, frozenset(rewriter.callees.items()), frozenset(inherited.items())
    if key not in _built:
        for each in ast.walk(read.node):
            if isinstance(each, ast.Attribute) and (attribute := inherited.get(ast.unparse(each))):
                each.value = ast.copy_location(ast.Name(_own_name(read.node), ast.Load()), each.value)
                each.attr = attribute
        _built[key] = build(read.function, read.node, read.place, _HELPERS)
    return _built[key]


def _add_to(maker: Any, other: Any) -> Call:
    """Return the call ``input += other`` but for its input, which `maker` has made."""
    return calls.add_to(running_role(maker) in MAKERS, other)


_HELPERS = {RUN: fused_stages.run_layers, CALL: calls.call, ADD: calls.add, ADD_TO: _add_to}


def _names_of(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function uses, with those of the functions in it."""
    inner = [_names_of(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def role_of(layer: Any) -> str | None:
    """Return the role of a layer by its class, whatever hooks it has now."""
    return ROLES.get(getattr(type(layer), "forward", None))


def _own_name(node: ast.FunctionDef) -> str:
    """Return the name of a method's first parameter, the module."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    if not arguments:
        raise Unreadable("its forward takes no self")
    return arguments[0].arg


def _callees(
    function: FunctionType, node: ast.FunctionDef, known: dict[str, Any]
) -> tuple[dict[str, Callee], dict[str, nn.Module]]:
    """Return the callees, iterables and tests of a function, as far as the module's attributes decide them, and those
    that are modules.
    """
    owner = _own_name(node)
    if any(isinstance(n, ast.Name) and n.id == owner and not isinstance(n.ctx, ast.Load) for n in ast.walk(node)):
        raise Unreadable(f"its forward changes {owner}")
    own = {owner, *function.__code__.co_freevars}
    others = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars)
    callees: dict[str, Callee] = {}
    layers: dict[str, nn.Module] = {}
    for each in ast.walk(node):
        place = getattr(each, _PLACES.get(type(each), ""), None)
        if place is None or any(isinstance(n, ast.Name) and n.id in others - own for n in ast.walk(place)):
            continue
        text = ast.unparse(place)
        if isinstance(each, ast.If):
            text, callee = f"if {text}", _test(place, known)
        else:
            value = _value(place, known)
            if isinstance(value, nn.Module):
                layers[text] = value
            callee = _callee(value, loop=isinstance(each, ast.For))
        if callee:
            callees[text] = callee
    return callees, layers


_PLACES: dict[type[ast.AST], str] = {ast.Call: "func", ast.For: "iter", ast.If: "test"}  # where each has a callee


def _walked(node: ast.FunctionDef, known: dict[str, Any]) -> set[int]:
    """Return the ids of the rows whose layers a function uses only one by one, never the row as a whole."""
    taken, whole = set[int](), set[int]()
    for parent in ast.walk(node):
        for each in ast.iter_child_nodes(parent):
            if not isinstance(each, ast.Attribute) or not isinstance(value := _value(each, known), _ROWS):
                continue
            item = isinstance(parent, ast.Subscript) and not isinstance(parent.slice, ast.Slice)
            if item or isinstance(parent, (ast.For, ast.comprehension)) or _calls_any(parent, ("enumerate", "zip")):
                taken.add(id(value))
            elif not _calls_any(parent, ("len",)):
                whole.add(id(value))
    return taken - whole


def _calls_any(node: ast.AST, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


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
    """Return the value of an expression of names, attributes, constants and constant indices, or _UNKNOWN."""
    if isinstance(place, ast.Constant):
        return place.value
    if isinstance(place, ast.Name):
        return known.get(place.id, _UNKNOWN)
    if isinstance(place, ast.Attribute):
        owner = _value(place.value, known)
        if owner is _UNKNOWN or isinstance(inspect.getattr_static(type(owner), place.attr, None), property):
            return _UNKNOWN
        return getattr(owner, place.attr, _UNKNOWN)
    if isinstance(place, ast.Subscript) and isinstance(place.slice, ast.Constant):
        holder, index = _value(place.value, known), place.slice.value
        if not isinstance(holder, (*_CONTAINERS, list, tuple, dict)):
            return _UNKNOWN
        try:
            return operator.getitem(holder, index)  # type: ignore[misc]
        except (LookupError, TypeError):
            return _UNKNOWN
    return _UNKNOWN


_PLAIN = (bool, int, float, str, type(None), list, tuple, dict, nn.Module)  # what a module's layout hangs on


def _test(test: ast.expr, known: dict[str, Any]) -> Callee | None:
    """Return whether a test holds, or None: if the module's attributes do not decide it, or it asks for `training`."""
    if not simple(test) or any(isinstance(each, ast.Attribute) and each.attr == "training" for each in ast.walk(test)):
        return None
    try:
        value = eval(compile(ast.Expression(test), "<test>", "eval"), known)
    except Exception:  # the forward itself will say so
        return None
    return Callee("test", str(bool(value)).lower()) if isinstance(value, _PLAIN) else None


def _callee(value: Any, *, loop: bool) -> Callee | None:
    if loop:
        stock = isinstance(value, _ROWS) and type(value).__iter__ in [each.__iter__ for each in _ROWS]
        return Callee("layers", None) if stock else None
    if isinstance(value, nn.Module):
        return Callee("layer", ROW if is_row(value) else role_of(value))
    try:
        known = FUNCTIONS.get(value)
    except TypeError:  # not hashable
        return None
    return Callee("function", known[0]) if known else None
