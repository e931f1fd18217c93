"""Regenerates the protobuf code: `python -m protos.generate` (needs the `test` extra). A test keeps it current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of every .proto file to `out`; returns the files."""
    sources = sorted(path.name for path in HERE.glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([*command, f"--grpc_python_out={out}", *sources], check=True, cwd=HERE)
    for path in out.glob("*_pb2_grpc.py"):  # the generator writes absolute imports; ours live in a package
        text = re.sub(r"^import (\w+_pb2) as", r"from protos import \1 as", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
    return sorted(out.glob("*_pb2*.py*"))


if __name__ == "__main__":
    for written in generate(HERE):
        print(written.name)
