"""Compile a Triton kernel for a GPU that is not there, and read back what the hardware would get.

Triton brings ptxas, cuobjdump and nvdisasm; neither a driver nor a GPU is needed. `TRITON_INTERPRET` must not be set
when the module of the kernel is imported: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.bench.builds.limits import SHARED as SHARED_LIMIT
from workers.bench.builds.readback import Built as Compiled
from workers.bench.builds.readback import read_back

__all__ = ["SHARED_LIMIT", "Compiled", "compile_kernel", "compile_to_ptx"]


def compile_kernel(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any], *, num_warps: int = 4,
    num_stages: int = 3, maxnreg: int | None = None, multiples: tuple[str, ...] = (),
) -> Compiled:  # fmt: skip
    """Compile a kernel for one compute capability.

    Args:
        kernel: a function decorated with `triton.jit`.
        capability: 80, 90 or 100.
        signature: the type of every parameter that is no constant, such as `*bf16`, `i32`, `fp32`, or
            `tensordesc<bf16[64,128]>` for a descriptor made by the caller. Pointers are multiples of 16 bytes.
        constants: the values of `tl.constexpr` parameters, and None for optional pointers that are not passed.
        multiples: the integers that are multiples of 16, as strides are: a launch finds that out by itself.

    Raises:
        Exception: what Triton raises for a kernel that it cannot compile.
    """
    built = _build(kernel, capability, signature, constants, multiples, num_warps, num_stages, maxnreg)
    return read_back(built.asm["cubin"], int(built.metadata.shared), num_warps)


def compile_to_ptx(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any], *, num_warps: int = 4
) -> str:
    """Return the PTX of a kernel, which tells how operations are rounded; the arguments are those of compile_kernel."""
    return str(_build(kernel, capability, signature, constants, (), num_warps, 3, None).asm["ptx"])


def _build(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any],
    multiples: tuple[str, ...], num_warps: int, num_stages: int, maxnreg: int | None,
) -> Any:  # fmt: skip
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    differing = (set(signature) | set(constants)) ^ set(names)
    assert not differing, f"parameters that only the kernel or only the call has: {sorted(differing)}"
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name in multiples
    }
    source = ASTSource(kernel, types, dict(constants), aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return build(source, GPUTarget("cuda", capability, 32), options)
