"""Compiles the C++ kernels on first use and keeps the library for next time.

The sources have a plain C interface and include no header of torch, so an upgrade of torch needs no other build. They
share torch's OpenMP threads: both link `libgomp.so.1`, which is loaded once a process. Without a compiler, or where
the library cannot be loaded, `load` says why and the PyTorch twins serve.

Environment: `LONGREACH_KERNELS=off` uses the twins; `CXX` names the compiler; `XDG_CACHE_HOME` holds the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protos.node.compiler import compiler

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled library, or in `reason` why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def load() -> Kernels:
    """The library of this machine, compiled now if it is not there yet (some 20 seconds, once)."""
    if os.environ.get("LONGREACH_KERNELS", "").lower() in ("off", "0", "false"):
        return Kernels(None, "LONGREACH_KERNELS is off")
    import torch  # noqa: F401  - its libgomp must be the one both use

    try:
        return Kernels(ctypes.CDLL(str(library_path(build=True))))
    except (OSError, subprocess.SubprocessError) as error:
        return Kernels(None, " ".join(str(error).split())[:300])


def library_path(build: bool = False) -> Path:
    """Where the library of the present sources lies; with `build` it is there afterwards.

    Raises:
        OSError: there is no compiler, or it failed (with its first error line).
    """
    sources = sorted(_FOLDER.rglob("*.cpp"))
    digest = hashlib.sha256()
    for path in (*sources, *sorted(_FOLDER.rglob("*.h"))):
        digest.update(path.relative_to(_FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update("\0".join((*_FLAGS, platform.machine())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longreach"
    path = cache / f"kernels-{digest.hexdigest()[:16]}.so"
    if build and not path.exists():
        _compile(sources, path)
    return path


def _compile(sources: list[Path], path: Path) -> None:
    found = compiler()
    if found is None:
        raise OSError("no C++ compiler found (c++, g++ or clang++, or CXX); install one for fast attention")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        if path.exists():  # by another process, while this one waited
            return
        built = Path(scratch) / path.name
        command = [found, *_FLAGS, f"-I{_FOLDER}", *map(str, sources), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise OSError(f"{found} failed with exit code {done.returncode}: {lines[0]}")
        os.replace(built, path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time build `path`: all actors of a cluster come to it together, and one is fastest alone."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield
