"""The files by which a head process is found on its machine: `head.pid` from its start, `head.json` once it is ready.

Both are in the data directory, written atomically by the head itself and removed when it stops. A pid file outlives a
head that was killed: it counts only if that process runs, is a head, and is no younger than the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.client.connection import LOG_FILE, STATE_FILE
from cluster.common.certificates import certificate_names
from cluster.config.schema import SecuritySection

PID_FILE = "head.pid"
_CLOCK_SLACK_S = 5.0  # file times and process times come from different clocks


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """The state files of one data directory."""

    data_dir: Path

    @property
    def log(self) -> Path:
        return self.data_dir / LOG_FILE

    def claim(self) -> None:
        """Write the pid file: this process is the head of the data directory."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        (self.data_dir / STATE_FILE).unlink(missing_ok=True)  # of a head that was killed
        _write(self.data_dir / PID_FILE, f"{os.getpid()}\n")

    def announce(self, address: str, security: SecuritySection | None = None) -> None:
        """Write `head.json`: this process is ready at an address, with this certificate."""
        here = reachable(address)
        state = {
            "address": here, "pid": os.getpid(), "started": psutil.Process().create_time(),
            "ca_file": "", "server_name": "",
        }  # fmt: skip
        if security is not None and security.tls_cert_file is not None:
            state |= {"ca_file": str(security.tls_cert_file), "server_name": name_for(security, here)}
        _write(self.data_dir / STATE_FILE, json.dumps(state) + "\n")

    def release(self) -> None:
        """Remove the files if this process wrote them."""
        if self._read_pid() == os.getpid():
            self.remove()

    def remove(self) -> None:
        """Remove the files, whoever wrote them."""
        for name in (STATE_FILE, PID_FILE):
            (self.data_dir / name).unlink(missing_ok=True)

    def running(self) -> psutil.Process | None:
        """Return the head that wrote the pid file, if it still runs."""
        pid = self._read_pid()
        if pid is None:
            return None
        try:
            written = (self.data_dir / PID_FILE).stat().st_mtime
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + _CLOCK_SLACK_S:
                return None
            return process if _is_head(process.cmdline()) else None
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            return None  # gone, or another user's: not ours

    def is_stale(self) -> bool:
        """Whether a head that no longer runs has left files."""
        return any((self.data_dir / name).exists() for name in (STATE_FILE, PID_FILE)) and self.running() is None

    def _read_pid(self) -> int | None:
        try:
            pid = int((self.data_dir / PID_FILE).read_text())
        except (OSError, ValueError):
            return None
        return pid if pid > 0 else None


def _is_head(command: list[str]) -> bool:
    """Whether a command line is `longreach serve ...` or `python -m cluster.cli serve ...`."""
    if "serve" not in command:
        return False
    before = command[: command.index("serve")]
    return "cluster.cli" in before or any(Path(word).name == "longreach" for word in before)


def name_for(security: SecuritySection, address: str) -> str:
    """The name by which to check the certificate at an address of this machine; empty when it is the address's own."""
    assert security.tls_cert_file is not None
    host, _, _ = address.rpartition(":")
    names = certificate_names(security.tls_cert_file.read_bytes())
    return "" if not names or host.strip("[]") in names else names[0].replace("*", "head", 1)


def reachable(address: str) -> str:
    """Return the address at which this machine reaches a server; bound to all interfaces, that is the loopback."""
    for wildcard, loopback in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:"), (":::", "[::1]:")):
        if address.startswith(wildcard):
            return loopback + address[len(wildcard) :]
    return address


def _write(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
