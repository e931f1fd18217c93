"""Where a head is and how to talk to it: address, API key, TLS. Arguments go before the environment.

A ready head describes itself to clients on its machine in a state file under its data directory.

Environment: LONGREACH_API_KEY, LONGREACH_CA_FILE, LONGREACH_CERT_FILE, LONGREACH_KEY_FILE.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from cluster.client.errors import START_HINT, InvalidRequest, Unavailable
from cluster.common.addresses import is_loopback, split_address

DEFAULT_ADDRESS = "127.0.0.1:7777"
DEFAULT_DATA_DIR = "~/.local/share/longreach"  # as in cluster.config.schema
STATE_FILE = "head.json"  # under the data directory, while a head is ready
PID_FILE = "head.pid"  # beside it, while a head runs
LOG_FILE = "log/head.log"  # under the data directory, of heads that `longreach up` has started
_MAX_LINE = 4096  # bytes
FileName = str | os.PathLike[str] | None


class ConnectionOptions(TypedDict, total=False):
    """Keyword arguments of the clients besides address and key. An empty file name means none at all.

    Attributes:
        ca_file: PEM of the authority, or of the head's own certificate; turns TLS on. Default: LONGREACH_CA_FILE.
        cert_file: PEM of this client, for a head that wants one (mutual TLS). Default: LONGREACH_CERT_FILE.
        key_file: PEM of its key. Default: LONGREACH_KEY_FILE.
        server_name: a name in the head's certificate, when the host of the address is none.
        allow_plaintext_key: send the API key to another machine although nothing is encrypted.
        timeout_s: seconds for one call, without the time a job takes. Default: 30.
    """

    ca_file: FileName
    cert_file: FileName
    key_file: FileName
    server_name: str
    allow_plaintext_key: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a client; without `ca` the roots that gRPC brings are trusted."""

    ca: Path | None
    cert: Path | None
    key: Path | None


@dataclass(frozen=True, slots=True)
class Connection:
    """The arguments of a client, checked (InvalidRequest) but for the files, which are not opened yet."""

    address: str = DEFAULT_ADDRESS
    api_key: str | None = None
    ca_file: FileName = None
    cert_file: FileName = None
    key_file: FileName = None
    server_name: str = ""
    allow_plaintext_key: bool = False
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not (self.is_unix or split_address(self.address)):
            raise InvalidRequest(f"address: {self.address!r}: must be HOST:PORT such as {DEFAULT_ADDRESS}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)) or not self.timeout_s > 0:
            raise InvalidRequest(f"timeout_s: {self.timeout_s!r}: must be a number of seconds above 0")
        files = self.tls
        if files is not None and (files.cert is None) != (files.key is None):
            lacking, other = ("cert_file", files.key) if files.cert is None else ("key_file", files.cert)
            raise InvalidRequest(f"{lacking}: (missing): goes with {other}: give both or neither")
        key = self.secret
        if not (key.isascii() and (key.isprintable() and " " not in key)):
            raise InvalidRequest("api_key: must be ASCII without spaces, line ends or control characters")
        if key and self.tls is None and not self.is_local and not self.allow_plaintext_key:
            raise InvalidRequest(
                f"address: {self.address}: the API key would travel there in plain text: turn TLS on (ca_file, "
                "--ca-file, LONGREACH_CA_FILE), or allow it in words (allow_plaintext_key=True, --allow-plaintext-key)"
            )

    @property
    def is_unix(self) -> bool:
        return self.address.startswith("unix:")

    @property
    def is_local(self) -> bool:
        """Whether the address is one of this machine."""
        where = split_address(self.address)
        return self.is_unix or (where is not None and is_loopback(where[0]))

    @property
    def tls(self) -> TlsFiles | None:
        """The files of TLS; None for plaintext."""
        ca = _file(self.ca_file, "LONGREACH_CA_FILE")
        cert, key = _file(self.cert_file, "LONGREACH_CERT_FILE"), _file(self.key_file, "LONGREACH_KEY_FILE")
        return None if ca is None and cert is None and key is None else TlsFiles(ca, cert, key)

    @property
    def secret(self) -> str:
        """The API key of the argument, else of the environment variable LONGREACH_API_KEY, else empty."""
        return self.api_key if self.api_key is not None else os.environ.get("LONGREACH_API_KEY", "")


def _file(argument: FileName, variable: str) -> Path | None:
    name = os.environ.get(variable, "") if argument is None else os.fspath(argument)
    return Path(name).expanduser() if name else None


def read_state(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a ready head wrote: address, pid, started (seconds since 1970), ca_file, server_name, http_url.

    `ca_file` is its certificate and empty without TLS; `server_name` is a name in it when the address is none.

    Raises:
        Unavailable: no head is ready under this data directory.
    """
    path = Path(data_dir).expanduser() / STATE_FILE
    try:
        if path.stat().st_mode & 0o022:
            raise Unavailable(f"{path}: others can write to it, and it says where keys go: start the head again")
        if path.with_name(PID_FILE).exists() and not _is_held(path.parent):
            raise Unavailable(f"{path}: was left by a head that no longer runs: {START_HINT}")
        state = json.loads(path.read_bytes())
        values = {"address": str(state["address"]), "pid": int(state["pid"]), "started": float(state["started"])}
        return values | {key: str(state.get(key, "")) for key in ("ca_file", "server_name", "http_url")}
    except OSError as error:
        ended = f"; the last head ended: {reason}" if (reason := last_failure(data_dir)) else ""
        raise Unavailable(f"{path}: cannot be read ({error.strerror}): {START_HINT}{ended}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path}: is not the state of a head: delete it, then: longreach up CONFIG") from error


def _is_held(data_dir: Path) -> bool:
    """Return whether a head holds the lock of its data directory; True where that cannot be said."""
    try:
        from protos.node.locks import is_locked  # not on Windows

        return is_locked(data_dir)
    except (ImportError, OSError):
        return True


def last_failure(data_dir: str | os.PathLike[str]) -> str:
    """Return the error with which the newest head of a data directory ended by itself, as its log says; else ""."""
    try:
        with (Path(data_dir).expanduser() / LOG_FILE).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _MAX_LINE))
            lines = log.read().decode(errors="replace").rstrip().splitlines()
    except OSError:
        return ""
    mark = "longreach: error: "
    return lines[-1].removeprefix(mark) if lines and lines[-1].startswith(mark) else ""


def state_connection(data_dir: str | os.PathLike[str], options: ConnectionOptions) -> tuple[str, ConnectionOptions]:
    """Return (address, options) of the head that is ready under a data directory.

    What `options` leaves out is taken from the state the head wrote: a plaintext head is met in plaintext whatever the
    environment says, a TLS head is trusted by its own certificate. Raises Unavailable when no head is ready there.
    """
    state = read_state(data_dir)
    from_state: ConnectionOptions = {"ca_file": state["ca_file"], "server_name": state["server_name"]}
    if not state["ca_file"]:
        from_state |= {"cert_file": "", "key_file": ""}
    return state["address"], from_state | options
