"""Generate the protobuf code: `python -m protos.generate` (needs the `test` extra). A test keeps it current.

The files register as `longreach/<package>/v1/<name>.proto`, so that they share a process with any other package's
`jobs.proto`; protobuf refuses two different files of one name.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jobs", "stage")


def generate(out: Path) -> list[Path]:
    """Write `<package>/*_pb2.py`, `*_pb2.pyi`, `*_pb2_grpc.py` of every .proto file below `out`; return the files."""
    written = []
    for package in PACKAGES:
        virtual = f"longreach/{package}/v1"
        target = out / package
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{virtual}=protos/{package}"]
            command += [f"--python_out={scratch}", f"--pyi_out={scratch}", f"--grpc_python_out={scratch}"]
            subprocess.run([*command, f"{virtual}/{package}.proto"], check=True, cwd=ROOT)
            for path in sorted((Path(scratch) / virtual).iterdir()):
                text = path.read_text().replace(
                    f"from {virtual.replace('/', '.')} import", f"from protos.{package} import"
                )
                text = re.sub(r"in longreach/\w+/v1/(\w+_pb2_grpc\.py)", r"in \1", text)
                (target / path.name).write_text(text)
                written.append(target / path.name)
    return written


if __name__ == "__main__":
    for path in generate(ROOT / "protos"):
        print(path.relative_to(ROOT))
