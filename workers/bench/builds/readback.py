"""What a compiled kernel takes of a GPU, read back from its machine code by the tools that Triton carries."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 1800  # a few seconds of work, on machines that may be busy with other things
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P(?:\d+|T) )?([A-Z][A-Z0-9]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Built:
    """What one build of a kernel takes: registers and stack per thread, `shared` bytes per program."""

    registers: int
    stack: int  # bytes; above 0 registers spill, or arrays lie in local memory
    shared: int
    warps: int
    instructions: Counter[str]  # by opcode without modifiers: HGMMA, HMMA, UTMALDG, LDGSTS, LDL, STL, SHFL

    def count(self, *opcodes: str) -> int:
        """Return how many instructions have one of these opcodes."""
        return sum(self.instructions[opcode] for opcode in opcodes)


def read_back(cubin: bytes, shared: int, warps: int) -> Built:
    """Disassemble machine code; `shared` is what Triton allocates when a kernel starts.

    Raises:
        ValueError: the tools print something else than expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
    registers, stack, static = (_number(name, usage) for name in ("REG", "STACK", "SHARED"))
    opcodes = _INSTRUCTION.findall(listing)
    if not opcodes:
        raise ValueError("nvdisasm: printed no instructions")
    return Built(registers, stack, max(static, shared), warps, Counter(opcodes))


def _run(tool: str, *arguments: str) -> str:
    from triton.backends import nvidia

    path = os.path.join(os.path.dirname(nvidia.__file__), "bin", tool)
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout


def _number(name: str, usage: str) -> int:
    match = re.search(rf"{name}:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump: no {name} in {usage[-500:]}")
    return int(match[1])
