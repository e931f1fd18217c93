"""Who owns a data directory, and the files by which its head is found: `head.pid` from its start, `head.json` once it
is ready.

A head holds the lock of the directory as long as its process lives; that alone decides whether one runs. The files say
which process it is and where it listens. They are written atomically by the head itself and removed when it stops; a
head that was killed leaves them, and they mean nothing without the lock.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil

from cluster.client.connection import LOG_FILE, PID_FILE, STATE_FILE
from cluster.common.certificates import certificate_names
from cluster.common.errors import ClusterError, PreflightError
from cluster.config.schema import SecuritySection
from protos.node.locks import is_locked, lock_folder

_TRIES, _PAUSE_S = 20, 0.05  # for a head that has just taken the lock to say who it is, or for a reader to let it go


class HeadRunning(ClusterError):
    """A head owns the data directory already; `pid` is None where it has not said which process it is."""

    def __init__(self, pid: int | None, way_out: str = "") -> None:
        who = f"pid {pid}" if pid is not None else "it is just starting or stopping"
        super().__init__(f"a head is already running ({who})" + (f"; {way_out}" if way_out else ""))
        self.pid = pid


class HeadFiles:
    """The lock and the state files of one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._lock: int | None = None  # the descriptor, while this process is the head

    @property
    def log(self) -> Path:
        return self.data_dir / LOG_FILE

    def claim(self) -> None:
        """Make this process the head of the data directory: take its lock and write the pid file.

        Raises:
            HeadRunning: another process is. PreflightError: the directory cannot be made, locked or written.
        """
        for _ in range(_TRIES):
            try:
                self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = lock_folder(self.data_dir)
            except OSError as error:
                raise self._unusable(error) from error
            if self._lock is not None:
                break
            time.sleep(_PAUSE_S)  # a reader holds it for a moment
        else:
            raise HeadRunning(self._read_pid())
        try:
            self._remove()  # of a head that was killed
            self._write(PID_FILE, f"{os.getpid()}\n")
        except BaseException:
            self.release()
            raise

    def announce(self, address: str, security: SecuritySection | None = None, http_url: str = "") -> None:
        """Write `head.json`: this process is ready at an address, with this certificate. Raises PreflightError."""
        here = reachable(address)
        state = {
            "address": here, "pid": os.getpid(), "started": psutil.Process().create_time(),
            "ca_file": "", "server_name": "", "http_url": http_url,
        }  # fmt: skip
        if security is not None and security.tls_cert_file is not None:
            state |= {"ca_file": str(security.tls_cert_file), "server_name": name_for(security, here)}
        self._write(STATE_FILE, json.dumps(state) + "\n")

    def release(self) -> None:
        """Remove the files and free the lock if this process holds it."""
        if self._lock is not None:
            try:
                self._remove()
            finally:
                os.close(self._lock)
                self._lock = None

    def running(self) -> psutil.Process | None:
        """Return the head of the data directory, None when none runs.

        Raises:
            HeadRunning: one does, but its process cannot be seen from here. PreflightError: there are no locks.
        """
        for _ in range(_TRIES):
            if not self._is_locked():
                return None
            if (process := self._find()) is not None:
                return process
            time.sleep(_PAUSE_S)  # it has taken the lock and not yet written the file
        raise HeadRunning(self._read_pid(), "its process cannot be seen from here: stop it where it was started")

    def remove_stale(self) -> bool:
        """Remove the files of a head that no longer runs, not those of a living one; returns whether there were any."""
        if not self.data_dir.is_dir():
            return False
        try:
            lock = lock_folder(self.data_dir)
        except OSError as error:
            raise self._unusable(error) from error
        if lock is None:
            return False
        try:
            return self._remove()
        finally:
            os.close(lock)

    def _is_locked(self) -> bool:
        try:
            return is_locked(self.data_dir)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> PreflightError:
        return PreflightError(
            f"data_dir: {self.data_dir}: cannot be locked ({error.strerror or error}): "
            "must be a folder of yours on a local disk"
        )

    def _find(self) -> psutil.Process | None:
        """Return the process that the pid file names, if it is a head: the file may be older than the lock."""
        try:
            process = psutil.Process(self._read_pid() or -1)
            return process if is_head(process.cmdline()) else None
        except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            return None  # gone, or another user's: not ours

    def _remove(self) -> bool:
        files = [path for name in (STATE_FILE, PID_FILE) if (path := self.data_dir / name).exists()]
        try:
            for path in files:
                path.unlink(missing_ok=True)
        except OSError as error:
            problem = f"cannot be removed ({error.strerror}): remove what is in the way"
            raise PreflightError(f"data_dir: {error.filename}: {problem}") from error
        return bool(files)

    def _write(self, name: str, text: str) -> None:
        """Replace a file atomically, readable for this user only: a reader sees the old text or the new one."""
        temporary = self.data_dir / f".{name}.{os.getpid()}"
        try:
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            os.replace(temporary, self.data_dir / name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PreflightError(
                f"data_dir: {self.data_dir}: {name} cannot be written ({reason}): free space there, or choose another"
            ) from error

    def _read_pid(self) -> int | None:
        try:
            pid = int((self.data_dir / PID_FILE).read_text())
        except (OSError, ValueError):
            return None
        return pid if pid > 0 else None


def is_head(command: list[str]) -> bool:
    """Return whether a command line is `longreach serve ...` or `python -m cluster.cli serve ...`."""
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
