"""What a node is: its build, versions, processor and compiler; and the one writer of benchmark results.

Needs the standard library only.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

COMPILERS = ("c++", "g++", "clang++")
_PACKAGES = ("cluster", "protos", "workers")
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # that decide the speed of matrix products
_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Return date, build, versions and processor as plain data; the version of a package that is missing is None."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version_of("longreach"),
        "build": build_id(),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "ray": version_of("ray"),
        "cpu": cpu_name(),
        "cores": usable_cores(),
    }


@cache
def build_id() -> str:
    """Return a fingerprint of the installed code, so that every node of a cluster can be checked to run the same.

    16 hexadecimal digits of the SHA-256 over names and contents of the sources.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            if "training" in path.relative_to(_ROOT).parts:  # not in the wheel
                continue
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """Return the path of the C++ compiler, None without: what `CXX` names, else the first of `COMPILERS`."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def usable_cores() -> int:
    """Return the cores that this process may use (all of the machine where there is no affinity, as on macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None without it, as on a bare machine with a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_facts(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str] | None:
    """Return what Linux says of the last core, by its names for it; None where there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def write_result(path: Path | None, result: Mapping[str, Any], **facts: Any) -> str:
    """Return, and write to `path`, a benchmark's result and its environment (`facts` replace entries) as JSON text."""
    where = environment() | {"commit": commit_id(), "load_average": os.getloadavg()[0]} | facts
    text = json.dumps({"environment": where, **result}, indent=1)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def cpu_name() -> str:
    """Return the processor's name and those of `_FEATURES` it has."""
    if (facts := cpu_facts()) is None:
        return platform.processor() or platform.machine()
    flags = set(facts.get("flags", "").split())
    features = [name for name in _FEATURES if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(features) or 'no vector extensions named'})"


def commit_id() -> str | None:
    """Return the commit of the working tree, with `+` when files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        output = subprocess.check_output(command, text=True, timeout=30, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip() or None
