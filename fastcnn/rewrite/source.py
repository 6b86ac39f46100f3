"""A function's syntax tree, known to be what runs, and a function made of a changed tree, with the same lines."""

import __future__

import ast
import copy
import functools
import inspect
import linecache
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_NOT_PLAIN = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Unreadable(Exception):
    """Why a function cannot be rewritten."""


class Place(NamedTuple):
    """What compiling a function depends on besides its own tree: its class's name, and what its file imports."""

    class_name: str
    imports: tuple[ast.stmt, ...]


def definition(function: Any) -> tuple[ast.FunctionDef, Place]:
    """Return a copy of a function's syntax tree without decorators, and the place where it is written.

    Raises Unreadable if there is no source, or it is not what runs: edited since, changed by a decorator or a tool.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise Unreadable("its forward is wrapped by a decorator or made by a tool")
    code = function.__code__
    if code.co_flags & _NOT_PLAIN:
        raise Unreadable("its forward is a generator or a coroutine")
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise Unreadable("the source of its forward is not available")
    found = _functions("".join(lines), code.co_filename).get((code.co_name, code.co_firstlineno))
    if found is None or _code(function, *found, ()).replace(co_flags=code.co_flags) != code:
        raise Unreadable("its forward differs from its source file")
    node = copy.deepcopy(found[0])
    node.decorator_list = []
    return node, found[1]


def build(function: Any, node: ast.FunctionDef, place: Place, helpers: dict[str, Any]) -> FunctionType:
    """Return a function like `function`, which it wraps, with the changed tree `node`; it knows `helpers` by name."""
    code = _code(function, node, place, tuple(helpers))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(CellType(helpers[name]) if name in helpers else cells[name] for name in code.co_freevars)
    code = code.replace(co_qualname=function.__code__.co_qualname, co_firstlineno=function.__code__.co_firstlineno)
    made = FunctionType(code, function.__globals__, None, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    return made


@functools.lru_cache(maxsize=32)
def _functions(source: str, filename: str) -> dict[tuple[str, int], tuple[ast.FunctionDef, Place]]:
    """Return the functions of a file by name and first line, a decorator's if there is one."""
    try:
        tree = ast.parse(source, filename)
    except SyntaxError as error:
        raise Unreadable("its source file cannot be read as Python") from error
    imports = tuple(_imports(tree))
    return {
        (node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])): (
            node,
            Place(class_name, imports),
        )
        for node, class_name in _defined(tree, "_")
    }


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield what the file imports into its own names, which the compiler reads in another way than other globals."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import) or (isinstance(child, ast.ImportFrom) and child.module != "__future__"):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _imports(child)


def _defined(node: ast.AST, class_name: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, class_name
        yield from _defined(child, child.name if isinstance(child, ast.ClassDef) else class_name)


def _code(function: FunctionType, node: ast.FunctionDef, place: Place, helpers: tuple[str, ...]) -> CodeType:
    """Compile a definition where it stands: in a class, for `__class__` and names that begin with two underscores, in
    a function whose variables are the free ones.
    """
    free = [name for name in (*function.__code__.co_freevars, *helpers) if name != "__class__"]
    in_a_function = place.class_name in function.__code__.co_freevars
    template = [
        "def around():",
        *(f"    {name} = None" for name in free),
        *([] if in_a_function else [f"    global {place.class_name}"]),  # as the methods that name their class read it
        f"    class {place.class_name}:",
        "        pass",
    ]
    module = ast.parse("\n".join(template))
    module.body[0].body[-1].body = [node]  # type: ignore[attr-defined]
    module.body[:0] = place.imports  # compiled, never run
    ast.fix_missing_locations(module)
    flags = function.__code__.co_flags & _FUTURES
    code: CodeType = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for name in ("around", place.class_name, node.name):
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == name)
    return code
