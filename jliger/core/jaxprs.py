"""Traces a user's function once, and evaluates it wherever its values are needed.

A function may close over traced arrays, which cannot be reached from inside a loop that is partitioned later. Tracing
turns them into inputs. `dce_jaxpr` and the interpretation of jaxprs are those of jax 0.12.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, NamedSharding, get_abstract_mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from jliger.core.meshes import varying_axes

# The primitives that are inlined, and their parameter with the inner program.
_INLINED = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Traced(NamedTuple):
    """A traced function.

    Attributes:
      jaxpr: its program. The same function with arguments of the same types has the same program, so that it can be
        part of the key of a compiled program.
      consts: the arrays that it closes over, of any dtype.
      out: the shapes and dtypes of its results, as the tree that it returns.
      varying: in a `shard_map`, the axes over which the arguments must vary.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    out: Any
    varying: frozenset[str] = frozenset()


def trace(function: Callable[..., Any], arguments: Any, varying: frozenset[str]) -> Traced:
    """Traces a function for arguments of these shapes and dtypes.

    In a `shard_map`, the arguments vary over the axes of `varying`, and over those of what the function closes over.
    Elsewhere the mesh is left out of the types: the function is evaluated on one device's arrays.
    """
    mesh = get_abstract_mesh()
    if not mesh.manual_axes:
        with use_abstract_mesh(AbstractMesh((), ())):
            return _traced(function, arguments)

    def in_shard_map(axes: frozenset[str], leaf: Any) -> Any:
        kind = jax.sharding.ManualAxisType(varying=axes) if axes else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()), manual_axis_type=kind)

    while True:
        traced = _traced(function, jax.tree.map(functools.partial(in_shard_map, varying), arguments))
        of_consts = frozenset().union(*map(varying_axes, traced.consts))
        if of_consts <= varying:
            return traced._replace(varying=varying)
        # The results vary over the axes of what the function closes over, too.
        varying |= of_consts


def _traced(function: Callable[..., Any], arguments: Any) -> Traced:
    closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return Traced(closed.jaxpr, closed.consts, out)


@functools.lru_cache(maxsize=256)
def gradient(jaxpr: Jaxpr, inputs: tuple[int, ...]) -> ClosedJaxpr:
    """The program of the gradient of the first result, which is a scalar, with respect to `inputs`.

    Its inputs are the constants and the inputs of `jaxpr`. Custom derivatives are resolved here, because they keep the
    types with which they were traced. Cached, so that the same program has the same gradient.
    """
    num_consts = len(jaxpr.constvars)

    def differentiated(*operands: Any) -> Any:
        def first_result(chosen: list[Any]) -> Any:
            arguments = list(operands[num_consts:])
            for index, argument in zip(inputs, chosen, strict=True):
                arguments[index] = argument
            return jax.core.eval_jaxpr(jaxpr, operands[:num_consts], *arguments)[0]

        return jax.grad(first_result)([operands[num_consts + index] for index in inputs])

    types = [variable.aval for variable in (*jaxpr.constvars, *jaxpr.invars)]
    if get_abstract_mesh().manual_axes:
        return jax.make_jaxpr(differentiated)(*types)
    with use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(differentiated)(*types)


def inputs_read(jaxpr: Jaxpr, outputs: Sequence[bool]) -> list[bool]:
    """Which inputs the chosen outputs depend on."""
    return partial_eval.dce_jaxpr(jaxpr, list(outputs))[1]


def has_control_flow(jaxpr: Jaxpr) -> bool:
    """Whether a program has inner programs, such as those of `jax.lax.cond`, that are not inlined."""
    return any(
        equation.primitive.name not in _INLINED or has_control_flow(inner)
        for equation in jaxpr.eqns
        for inner in jaxprs_in_params(equation.params)
    )


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """The results of a program, in the caller's context.

    `jax.core.eval_jaxpr` restores the mesh with which each operation was traced, and inner programs have types with
    that mesh. Here they are inlined, and every operation gets its type from its operands.
    """
    consts = [*map(_without_mesh, consts)]
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return _without_mesh(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [*map(read, equation.invars)]
        primitive, parameters = equation.primitive, equation.params
        if primitive.name in _INLINED:
            inner = parameters[_INLINED[primitive.name]]
            results = evaluate(inner.jaxpr, inner.consts, *operands)
        elif primitive.name == "reshard":
            results = operands
        else:
            results = primitive.bind(*operands, **primitive.get_bind_params(parameters))
            results = results if primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [*map(read, jaxpr.outvars)]


def _without_mesh(constant: Any) -> Any:
    """A concrete array as a NumPy array, whose type has no mesh."""
    is_concrete = isinstance(constant, jax.Array) and not isinstance(constant, jax.core.Tracer)
    return np.asarray(constant) if is_concrete else constant
