"""Holds arrays to jaxtyping's annotations while tests run: a type checker for jaxtyping's import hook.

Arrays alone are checked, and after the call: what a function refuses it has refused by then, with its own message.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping calls with a function's arguments before the call, and with its result too after it."""
    signature = inspect.signature(function)
    # The one that is called before; and pytrees, which JAX makes of anything.
    if signature.return_annotation is Any or function.__name__ == "__init__":
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = [
            (name, value, signature.parameters[name].annotation)
            for name, value in signature.bind(*args, **kwargs).arguments.items()
        ]
        # What has two layouts comes last: by then the others have said which of its sides is which.
        for name, value, hint in sorted(arguments, key=lambda argument: len(arrays_of(argument[2])) > 1):
            if not fits(value, hint):
                raise TypeError(f"{name} is {jax.typeof(value) if isinstance(value, jax.Array) else value}, not {hint}")
        return function(*args, **kwargs)

    return checked


def alternatives_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def arrays_of(hint: Any) -> list[type]:
    """The kinds of arrays that an annotation names."""
    return [each for each in alternatives_of(hint) if isinstance(each, type) and issubclass(each, AbstractArray)]


def fits(value: Any, hint: Any) -> bool:
    """Whether an array is one of those that the annotation has; what is no array fits always."""
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        hints = typing.get_args(hint)
        return len(hints) != len(value) or all(map(fits, value, hints))
    arrays = arrays_of(hint)
    others = [each for each in alternatives_of(hint) if each in (Any, jax.Array) or typing.get_origin(each) is tuple]
    if not arrays or others or not isinstance(value, jax.Array):
        return True
    return any(isinstance(value, each) for each in arrays)
