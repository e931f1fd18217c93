"""What of a Ray that somebody else runs is open to other users of this machine: its token, its folder.

Whoever has the token of a Ray, or needs none, can run code on its nodes as their user.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from cluster.common.secret_files import read_secret

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_DEFAULT = Path(".ray", "auth_token")  # in the home directory


def check_token_file(environment: Mapping[str, str], home: Path) -> None:
    """Refuse a file with Ray's token that others can read or replace; Ray itself writes it open to all.

    Raises:
        PreflightError.
    """
    if environment.get(_MODE) != "token" or environment.get(_TOKEN):
        return
    path = Path(environment[_PATH]).expanduser() if environment.get(_PATH) else home / _DEFAULT
    if environment.get(_PATH) or path.exists():  # without any file Ray says what it needs
        read_secret(_PATH if environment.get(_PATH) else "Ray's token", path)


def weak_points(environment: Mapping[str, str], session: Path) -> list[str]:
    """Return a line for each thing by which others could use this Ray, with the way out.

    Args:
        session: Ray's folder for this start, with its sockets and logs.
    """
    lines = []
    if environment.get(_MODE) != "token":
        lines.append(
            f"{_MODE}: {environment.get(_MODE) or 'not set'}: whoever reaches the ports of this Ray can run code as "
            f"its user: start all its nodes, and the head, with {_MODE}=token and {_PATH}"
        )
    if is_open(session):
        lines.append(
            f"cluster.address: others can enter {session}, where this Ray has its sockets and logs: start Ray with a "
            "--temp-dir in a folder of mode 0700"
        )
    return lines


def is_open(folder: Path) -> bool:
    """Return whether users who are neither its owner nor of its group can enter a folder."""
    folder = folder.resolve()
    try:
        modes = [each.stat().st_mode for each in (folder, *folder.parents)]
    except OSError:
        return False
    return all(mode & stat.S_IXOTH for mode in modes)
