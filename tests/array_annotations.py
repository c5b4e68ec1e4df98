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
    if signature.return_annotation is Any:  # the one that is called before
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            hint = signature.parameters[name].annotation
            if not fits(value, hint):
                raise TypeError(f"{name} is {jax.typeof(value) if isinstance(value, jax.Array) else value}, not {hint}")
        return function(*args, **kwargs)

    return checked


def fits(value: Any, hint: Any) -> bool:
    """Whether an array is one of those that the annotation has; what is no array fits always."""
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        hints = typing.get_args(hint)
        return len(hints) != len(value) or all(map(fits, value, hints))
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(hint) if is_union else (hint,)
    arrays = [each for each in alternatives if isinstance(each, type) and issubclass(each, AbstractArray)]
    others = [each for each in alternatives if each in (Any, jax.Array) or typing.get_origin(each) is tuple]
    if not arrays or others or not isinstance(value, jax.Array):
        return True
    return any(isinstance(value, each) for each in arrays)
