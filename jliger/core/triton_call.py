"""Calls Triton kernels: through jax-triton on a GPU, or in Triton's interpreter if that is enabled.

Private APIs, as of jax 0.12, jax-triton 0.4.1 and triton 3.9: `jax.interpreters.partial_eval.dce_rules`,
`jax.interpreters.mlir`, `jax_triton.triton_lib.triton_kernel_call_p`, and `triton.runtime.interpreter`.
"""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
from jax.interpreters import mlir
from jax.interpreters.partial_eval import dce_rules
from jax.sharding import NamedSharding, PartitionSpec
from jax_triton.triton_lib import triton_kernel_call_p
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_INTERPRETER_DTYPES = {
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int32": "i32",
}


def _keep_call(used_outputs: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    """The dead-code-elimination rule of a Triton call: keeps all of it.

    Replaces the rule of jax-triton 0.4, which lacks an argument that jax 0.12 passes.
    """
    del used_outputs
    equation = rest[-1]
    return [True] * len(equation.invars), equation


dce_rules[triton_kernel_call_p] = _keep_call


def _lower_for_others(ctx: mlir.LoweringRuleContext, *operands: Any, **_: Any) -> Any:
    """Lowers a Triton call for platforms other than CUDA.

    In jax 0.12, `jax.export` for several platforms lowers each branch of `jax.lax.platform_dependent` for all of them.
    For the other platforms, the CUDA branch gets a call without a kernel. XLA removes this branch before compilation. A
    call without a kernel anywhere else fails to compile.
    """
    platforms = ctx.module_context.platforms
    if "cuda" not in platforms:
        raise NotImplementedError(
            f"a Triton kernel got lowered for {', '.join(platforms)}; pass implementation=None or 'xla', or lower for "
            "'cuda'."
        )
    return jax.ffi.ffi_lowering(jax_triton.CUSTOM_CALL_TARGET_NAME)(ctx, *operands)


mlir.register_lowering(triton_kernel_call_p, _lower_for_others)


def _convert_as_gpus_do(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Triton's conversion of floats in its interpreter, but for 8 bits to the nearest, and clipped, as GPUs do.

    That of triton 3.9 carries wrongly where rounding up changes the exponent.
    """
    dtype = _FLOAT8_DTYPES.get(target.name) if source.name == "fp32" else None
    if dtype is None:
        return _convert_float(values, source, target, rounding)
    limit = float(jnp.finfo(dtype).max)
    return np.clip(values.view(np.float32), -limit, limit).astype(dtype).view(np.uint8)


_FLOAT8_DTYPES = {"fp8e4nv": jnp.float8_e4m3fn, "fp8e5": jnp.float8_e5m2}
_convert_float = interpreter._convert_float
interpreter._convert_float = _convert_as_gpus_do  # pyrefly: ignore[bad-assignment]

# The interpreter patches `triton.language` while it runs, and simulated devices call it from several threads.
_one_at_a_time = threading.Lock()


def call_kernel(
    kernel: Any,
    operands: Sequence[jax.Array | None],
    out_type: Sequence[jax.ShapeDtypeStruct | None],
    *,
    name: str,
    grid: tuple[int],
    num_warps: int,
    num_stages: int,
    compute_capability: int | None,
    flops: int,
    bytes_accessed: int,
    most_registers: int | None = None,
    **constexprs: Any,
) -> tuple[Any, ...]:
    """Runs `kernel` over `grid` and returns its outputs, which are the only memory that it writes.

    A kernel is compiled once for each combination of dtypes, constexprs, and arguments that are None. Other shapes need
    no new compilation, except for the dimensions that are constexprs.

    Args:
      kernel: a `triton.jit` function. Its parameters are the operands, the outputs, then constexprs.
      operands: the arrays that it reads. For an operand of None, the kernel's parameter is None at compile time.
      out_type: shapes and dtypes of the outputs, none of which aliases an operand. For None, the kernel's parameter and
        the returned output are None.
      name: the name that profilers show.
      grid: number of programs to launch.
      num_warps: warps per program.
      num_stages: depth of Triton's software pipelines.
      compute_capability: the GPU to compile for, or None for the one present.
      flops: arithmetic operations, for profilers.
      bytes_accessed: bytes moved, for profilers.
      most_registers: the most registers per thread that the compiler may use, or None for its own choice. It decides
        how many programs run on a multiprocessor at once.
      **constexprs: the kernel's compile-time parameters, which are hashable; NamedTuples are allowed.
    """
    if isinstance(kernel, InterpretedFunction):
        outputs = _interpret(kernel, operands, out_type, grid, constexprs)
    else:
        # jax-triton 0.4.1 assigns outputs to the parameters that are not passed. So operands are passed, absent outputs
        # are passed as None, and present outputs are not. A None becomes a constexpr, which is part of the cache key.
        names = [parameter.name for parameter in kernel.params]
        given: dict[str, Any] = dict(zip(names, operands, strict=False))
        of_outputs = zip(names[len(operands) :], out_type, strict=False)
        given |= {name: None for name, output in of_outputs if output is None}
        outputs = jax_triton.triton_call(
            kernel=kernel,
            out_type=_present(out_type),
            grid=grid,
            name=name,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability,
            # `enable_fp_fusion` is explicit, because Triton's default differs between releases.
            backend_options={"enable_fp_fusion": True, "maxnreg": most_registers},
            cost_estimate={"flops": flops, "bytes_accessed": bytes_accessed},
            **given,
            **constexprs,
        )
    written = iter(_as_varying(outputs, _present(operands)))
    return tuple(None if output is None else next(written) for output in out_type)


def _present(arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(array for array in arrays if array is not None)


def _as_varying(outputs: Sequence[jax.Array], operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Casts the outputs to vary as the operands do: in a `shard_map`, jax-triton 0.4.1 types them as replicated."""

    def varying(array: jax.Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, operands))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        outputs = [jax.sharding.reshard(output, NamedSharding(mesh, PartitionSpec())) for output in outputs]
    return tuple(
        jax.lax.pcast(output, tuple(axes - varying(output)), to="varying") if axes - varying(output) else output
        for output in outputs
    )


def _interpret(
    kernel: Any,
    operands: Sequence[jax.Array | None],
    out_type: Sequence[jax.ShapeDtypeStruct | None],
    grid: tuple[int],
    constexprs: dict[str, Any],
) -> tuple[jax.Array, ...]:
    def run(*given: np.ndarray | None) -> tuple[np.ndarray, ...]:
        # Copies of the operands, so that a kernel that writes to an operand is detected below.
        inputs = [None if array is None else np.array(array, order="C") for array in given]
        outputs = [None if output is None else np.empty(output.shape, output.dtype) for output in out_type]
        pointers = [None if array is None else _Pointer(array) for array in [*inputs, *outputs]]
        # As on a GPU, 1 / 0 and 0 / 0 raise nothing: a row may have no columns.
        with _one_at_a_time, np.errstate(divide="ignore", invalid="ignore"):
            kernel[grid](*pointers, **constexprs)
        for before, after in zip(_present(given), _present(inputs), strict=True):
            if before.tobytes() != after.tobytes():
                raise AssertionError("a kernel wrote to one of its operands")
        return _present(outputs)

    return jax.pure_callback(run, _present(out_type), *operands, vmap_method="sequential")


class _Pointer:
    """The part of a torch tensor's interface that Triton's interpreter (3.9) uses, over a NumPy array.

    The interpreter copies tensors from and to a device; here these copies do nothing.
    """

    def __init__(self, array: np.ndarray):
        self._array = array
        self.dtype = _INTERPRETER_DTYPES[array.dtype.name]
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "_Pointer":
        return self

    def cpu(self) -> "_Pointer":
        return self

    def copy_(self, other: "_Pointer") -> None:
        del other

    def new_empty(self, *_: Any, **__: Any) -> "_Pointer":
        return self

    def set_(self, *_: Any) -> "_Pointer":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)
