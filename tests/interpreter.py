"""Triton's interpreter does the same in less time.

It looks triton.language through at every call of a device function, and compares each sum of integers with the limits
of its type, by a dozen operations of its own, to say nothing.
"""

import dataclasses
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class Nothing:
    """What a call inside a launch has patched: nothing, as the launch's patches hold."""

    def restore(self) -> None:
        """Leave all as it is."""


def patch_once(patch: Any) -> Any:
    """Return Triton's `_patch_lang`, which then patches once for a launch and the device functions that it calls."""
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # where any function may look
    inside = False

    def patched(fn: Any) -> Any:
        nonlocal inside
        if inside:
            return Nothing()
        scope = patch(everywhere)
        restore, inside = scope.restore, True

        def restored() -> None:
            nonlocal inside
            inside = False
            restore()

        scope.restore = restored
        return scope

    return patched


@functools.cache
def builtins_of(package: Any) -> list[tuple[str, Any]]:
    """Return the builtins of a module or class of triton.language, as they are outside launches."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """Like Triton's `_patch_builtin`, which looks for the builtins each time."""
    for name, member in builtins_of(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def by_name(find: Any) -> Any:
    """Return Triton's `_get_np_dtype`, which then builds its table once for each type of elements."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return found


def where_shapes_differ(broadcast: Any) -> Any:
    """Return Triton's `broadcast_impl_value`, which then leaves two blocks of one shape as they are."""

    def value(self: Any, lhs: Any, rhs: Any) -> Any:
        one = lhs.handle.data.shape == rhs.handle.data.shape and lhs.type.is_block() == rhs.type.is_block()
        return (lhs, rhs) if one else broadcast(self, lhs, rhs)

    return value


def hasten() -> None:
    """Put the functions above in the place of Triton's."""
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._patch_builtin = patch_builtins
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    builder, semantic = interpreter.interpreter_builder, interpreter.TritonSemantic
    # What a sum of integers is compared with is dropped where Triton does not debug.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    semantic.broadcast_impl_value = where_shapes_differ(semantic.broadcast_impl_value)
