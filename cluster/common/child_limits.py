"""What a child process that handles foreign input may take, set by itself before it touches any."""

from __future__ import annotations

import os


def limit_resources(memory_bytes: int, open_files: int, cpu_seconds: int | None = None) -> None:
    """Limit this process: address space, files, processor time; no core dump, no bytes written to files.

    Where the system has no such limits (Windows), only files are private.
    """
    os.umask(0o077)
    try:
        import resource
    except ImportError:
        return
    limits = {"AS": memory_bytes, "CORE": 0, "FSIZE": 0, "NOFILE": open_files}
    if cpu_seconds is not None:
        limits["CPU"] = cpu_seconds
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
