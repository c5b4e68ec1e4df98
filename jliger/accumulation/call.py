"""Splits a call into array operands, by role, and its static part."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Tree = Any


class Wanted(NamedTuple):
    """One argument to differentiate.

    Attributes:
      argnum: its position.
      filter: for a `flax.nnx` module, which variables to differentiate; None for its `nnx.Param`.
    """

    argnum: int
    filter: Any = None


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of positional arguments. An argument without a role is the same for every microbatch."""

    wanted: tuple[Wanted, ...]
    batch: tuple[int, ...]
    keys: tuple[int, ...]

    @classmethod
    def make(cls, argnums: Any, batch_argnums: int | Sequence[int], key_argnums: int | Sequence[int]) -> "Roles":
        """Makes roles from the arguments of `accumulate_gradients`.

        Raises:
          ValueError: an argument has two roles, or there is none to differentiate or to split.
          TypeError: an argument is not given by its position.
        """
        wanted = tuple(_wanted(argnum) for argnum in (argnums if isinstance(argnums, Sequence) else (argnums,)))
        named = {
            "argnums": [each.argnum for each in wanted],
            "batch_argnums": _positions("batch_argnums", batch_argnums),
            "key_argnums": _positions("key_argnums", key_argnums),
        }
        for name in ("argnums", "batch_argnums"):
            if not named[name]:
                raise ValueError(f"{name} got no argument; pass the position of one at least.")
        seen: dict[int, str] = {}
        for name, positions in named.items():
            for position in positions:
                if position in seen:
                    raise ValueError(
                        f"{name} got {position}, which {seen[position]} has too; an argument has one role."
                    )
                seen[position] = name
        return cls(wanted, tuple(named["batch_argnums"]), tuple(named["key_argnums"]))


class Operands(NamedTuple):
    """The arrays of a call.

    Attributes:
      differentiated: a tree for each differentiated argument; for a module, its differentiated variables.
      batch: a tree for each batch argument.
      keys: a tree for each key argument.
      state: all other variables of the modules.
      rest: all other arrays.
    """

    differentiated: tuple[Tree, ...]
    batch: tuple[Tree, ...]
    keys: tuple[Tree, ...]
    state: list[Array]
    rest: list[Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call. With `Operands`, of the whole batch or of a microbatch, the call can be made."""

    loss_fn: Callable[..., Any]
    roles: Roles
    graphs: tuple[Any, ...]
    state_tree: Any
    rest_tree: Any
    rest_static: tuple[Any, ...]

    def __call__(self, operands: Operands) -> tuple[Any, list[Array]]:
        """Calls `loss_fn`; returns its result, and the modules' state after the call."""
        arrays = iter(operands.rest)
        leaves = [next(arrays) if static is _ARRAY else static for static in self.rest_static]
        args, kwargs = self.rest_tree.unflatten(leaves)
        states = self.state_tree.unflatten(operands.state)
        for wanted, graph, tree, state in zip(
            self.roles.wanted, self.graphs, operands.differentiated, states, strict=True
        ):
            args[wanted.argnum] = tree if graph is None else _nnx().merge(graph, tree, state)
        for positions, trees in ((self.roles.batch, operands.batch), (self.roles.keys, operands.keys)):
            for position, tree in zip(positions, trees, strict=True):
                args[position] = tree
        result = self.loss_fn(*args, **kwargs)
        return result, self._state_of(args)

    def write_state(self, args: Sequence[Any], state: list[Array]) -> None:
        """Writes `state` into the caller's modules, as if `loss_fn` had been called with them."""
        states = self.state_tree.unflatten(state)
        for wanted, graph, tree in zip(self.roles.wanted, self.graphs, states, strict=True):
            if graph is not None:
                _nnx().update(args[wanted.argnum], tree)

    def _state_of(self, args: Sequence[Any]) -> list[Array]:
        states = tuple(
            None if graph is None else _split(args[wanted.argnum], wanted)[2]
            for wanted, graph in zip(self.roles.wanted, self.graphs, strict=True)
        )
        leaves, tree = jax.tree.flatten(states)
        if tree != self.state_tree:
            raise ValueError(
                "loss_fn added variables to a module or removed some, such as those of nnx.Module.sow; return them as "
                "aux instead."
            )
        return leaves


def take_apart(
    loss_fn: Callable[..., Any], roles: Roles, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Call, Operands]:
    """Splits a call into its static part and its arrays."""
    positions = [each.argnum for each in roles.wanted] + [*roles.batch, *roles.keys]
    for position in positions:
        if position >= len(args):
            raise ValueError(
                f"argument {position} got nothing: the call has {len(args)} positional arguments; arguments that are "
                "differentiated or split, and keys, are passed by position."
            )
    parts = [_split(args[each.argnum], each) for each in roles.wanted]
    graphs, differentiated, states = (tuple(part) for part in zip(*parts, strict=True))
    for each, tree in zip(roles.wanted, differentiated, strict=True):
        _check_floating(each.argnum, tree)
    state, state_tree = jax.tree.flatten(states)
    others = [None if position in positions else arg for position, arg in enumerate(args)]
    leaves, rest_tree = jax.tree.flatten((others, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    call = Call(
        loss_fn=loss_fn,
        roles=roles,
        graphs=graphs,
        state_tree=state_tree,
        rest_tree=rest_tree,
        rest_static=tuple(_ARRAY if flag else leaf for leaf, flag in zip(leaves, is_array, strict=True)),
    )
    return call, Operands(
        differentiated=jax.tree.map(jnp.asarray, differentiated),
        batch=tuple(jax.tree.map(jnp.asarray, args[position]) for position in roles.batch),
        keys=tuple(args[position] for position in roles.keys),
        state=state,
        rest=[leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag],
    )


class _Array:
    """A placeholder for an array among the static leaves."""


_ARRAY = _Array()


def _nnx() -> Any:
    """`flax.nnx` if it has been imported, else None: without it, no argument can be a module."""
    return sys.modules.get("flax.nnx")


def _split(arg: Any, wanted: Wanted) -> tuple[Any, Tree, Tree]:
    """Splits a module into its graph, the wanted variables and the others; other trees give `(None, arg, None)`."""
    nnx = _nnx()
    if nnx is None or not isinstance(arg, nnx.Module):
        if wanted.filter is not None:
            raise TypeError(f"argnums got a filter for argument {wanted.argnum}, which is no nnx.Module.")
        return None, arg, None
    return nnx.split(arg, nnx.Param if wanted.filter is None else wanted.filter, ...)


def _wanted(argnum: Any) -> Wanted:
    nnx = _nnx()
    if nnx is not None and isinstance(argnum, nnx.DiffState):
        return Wanted(_positions("argnums", argnum.argnum)[0], argnum.filter)
    return Wanted(_positions("argnums", argnum)[0])


def _positions(name: str, value: Any) -> list[int]:
    positions = [value] if not isinstance(value, Sequence) else list(value)
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int | np.integer) or position < 0:
            raise TypeError(f"{name} got {position!r}; pass positions of arguments, from 0.")
    return positions


def _check_floating(argnum: int, tree: Tree) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"argument {argnum} got {dtype} at {jax.tree_util.keystr(path) or 'its root'}; only floating-point "
                "arrays can be differentiated: pass other arrays as another argument."
            )
