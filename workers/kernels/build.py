"""Compile the C++ kernels on first use, cache the library, and load it.

The sources have a plain C interface and include no header of torch, so that an upgrade of torch needs no rebuild. They
share torch's OpenMP threads: both link `libgomp.so.1`, which a process loads once. Without a compiler, or where the
library cannot be loaded, `load` gives the reason and the PyTorch implementations are used.

Environment: `LONGREACH_KERNELS=off` selects the PyTorch implementations, and the name of an instruction set (`avx2`,
`avx512`, `avx512_bf16`, `amx`) the best one to use, so that different CPUs compute the same bits; `CXX` names the
compiler; `XDG_CACHE_HOME` is where the library is cached.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from protos.node.environment import compiler
from workers.kernels import abi  # imports torch, whose libgomp must be the one both use

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
_TIMEOUT_S = 300


class Kernels(NamedTuple):
    """The compiled library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def load() -> Kernels:
    """Return the library of this machine; it is compiled now if it is not there yet (some 20 seconds, once).

    Raises:
        RuntimeError: the library and `abi` do not agree.
        ValueError: `LONGREACH_KERNELS` names no instruction set.
    """
    if _limit() is None:
        return Kernels(None, "LONGREACH_KERNELS is off")
    try:
        library = ctypes.CDLL(str(library_path(build=True)))
    except (OSError, subprocess.SubprocessError) as error:
        return Kernels(None, " ".join(str(error).split())[:300])
    abi.declare(library)
    return Kernels(library)


def exported(name: str) -> Any:
    """Return an exported function of the library, which must be there."""
    library = load().library
    assert library is not None
    return getattr(library, name)


@functools.cache
def best_path() -> abi.Path | None:
    """Return the instruction set to use: the fastest one of this CPU, or the best one within the limit.

    None where the library is not built.
    """
    limit = _limit()
    if limit is None or load().library is None:
        return None
    if limit == "":
        return abi.Path(exported("longreach_fastest_path")())
    return min(paths()[-1], limit)


def paths() -> list[abi.Path]:
    """Return the instruction sets that this CPU has, the best one last; none where the library is not built."""
    return [] if load().library is None else list(abi.Path)[: exported("longreach_best_path")() + 1]


def _limit() -> abi.Path | Literal[""] | None:
    """Return the best instruction set that the environment allows: None for none, "" where it says nothing."""
    name = os.environ.get("LONGREACH_KERNELS", "").lower()
    if name in ("off", "0", "false"):
        return None
    if name in ("", "on", "1", "true"):
        return ""
    known = {path.name.lower(): path for path in abi.Path}
    if name not in known:
        raise ValueError(f"LONGREACH_KERNELS: {name!r}: must be off, or one of {', '.join(known)}")
    return known[name]


def kernel_family(device: torch.device) -> str:
    """Return a name of the kernels that compute on a device: results of two families differ in their last bits.

    On CPUs that is the compiled instruction set (`avx512`), and that of PyTorch where there is no library
    (`torch-avx512`); on GPUs the compute capability (`cuda-9.0`).
    """
    if device.type == "cuda":
        return "cuda-{}.{}".format(*torch.cuda.get_device_capability(device))
    path = best_path()
    if path is None:
        return f"torch-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '')}"
    return path.name.lower()


def library_path(build: bool = False) -> Path:
    """Return where the library of the present sources is cached; with `build` it exists afterwards.

    Raises:
        OSError: there is no compiler, or it failed; the message has its first error line.
    """
    sources = sorted(_FOLDER.rglob("*.cpp"))
    digest = hashlib.sha256()
    for path in (*sources, *sorted(_FOLDER.rglob("*.h"))):
        digest.update(path.relative_to(_FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update("\0".join((*_FLAGS, platform.machine())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longreach"
    path = cache / f"kernels-{digest.hexdigest()[:16]}.so"
    if build:
        _make_private(cache)
        if not _is_ours(path):
            _compile(sources, path)
    return path


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can write to. Raises OSError for one that belongs to another user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise OSError(f"{folder}: belongs to another user: set XDG_CACHE_HOME to a folder of yours")
    if status.st_mode & 0o022:
        folder.chmod(status.st_mode & 0o755)


def _is_ours(path: Path) -> bool:
    """Return whether it is a library that nobody but this user or root can have written: a process runs what it loads.

    Another is compiled in place of one that is not.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    is_trusted = status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022
    return stat.S_ISREG(status.st_mode) and is_trusted


def _compile(sources: list[Path], path: Path) -> None:
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler found (c++, g++ or clang++, or CXX); install one for fast attention")
    # All actors of a cluster start together, and one build is enough; the lock ends with the process, however it ends.
    with path.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_ours(path):  # built by another process while this one waited
            return
        built = Path(scratch) / path.name
        command = [cxx, *_FLAGS, f"-I{_FOLDER}", *map(str, sources), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise OSError(f"{cxx} failed with exit code {done.returncode}: {lines[0]}")
        built.chmod(0o700)
        os.replace(built, path)
