"""The C++ compiler of a node: the one that builds the kernels, and that `longreach doctor` reports."""

from __future__ import annotations

import os
import shutil

COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """Return the path of the C++ compiler, None without: what `CXX` names, else the first of `COMPILERS`."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None
