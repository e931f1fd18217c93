"""Compile a Triton kernel for a GPU that is not there, and read back what the hardware would get.

Triton brings ptxas, cuobjdump and nvdisasm; neither a driver nor a GPU is needed. `TRITON_INTERPRET` must not be set
when the module of the kernel is imported: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a thread block may have, by compute capability


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one build of a kernel takes: per thread, but `shared` bytes (static and dynamic) per thread block."""

    registers: int
    stack: int  # bytes; above 0 registers spill, or arrays lie in local memory
    shared: int
    instructions: Counter[str]  # by opcode without modifiers: HGMMA, HMMA, UTMALDG, LDGSTS, LDL, STL, SHFL

    def count(self, *opcodes: str) -> int:
        """Return how many instructions have one of these opcodes."""
        return sum(self.instructions[opcode] for opcode in opcodes)


def compile_kernel(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any], *, num_warps: int = 4,
    num_stages: int = 3, multiples: tuple[str, ...] = (),
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
    built = build(source, GPUTarget("cuda", capability, 32), {"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
    registers, stack, static = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK", "SHARED"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ |@!?U?PT )?([A-Z][A-Z0-9]*)", listing, re.MULTILINE)
    assert opcodes, "nvdisasm printed no instructions"
    return Compiled(registers, stack, max(static, int(built.metadata.shared)), Counter(opcodes))


def _run(tool: str, *arguments: str) -> str:
    from triton.backends import nvidia

    path = os.path.join(os.path.dirname(nvidia.__file__), "bin", tool)
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"cuobjdump: no {pattern} in {text[-500:]}"
    return match[1]
