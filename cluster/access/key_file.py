"""Changes of the keys file: a key added, those of a name removed. A head that uses the file notices within seconds."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.access.keys import HASHED, WHAT, key_digest, read_lines
from cluster.common.secret_files import read_secret
from cluster.jobs.tenants.tenant import Tenant
from protos.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NAME_RULE = "must be 1 to 64 letters, digits, dots, dashes, underscores or @, the first a letter or digit"
_KEY_BYTES = 32  # random ones of a key


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key as it is listed: the first digits of its SHA-256, and what it stands for."""

    id: str
    tenant: Tenant


class KeyFile:
    """A keys file. Each change is written as a whole, to a new file that takes the place of the old one."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def list(self) -> list[KeyLine]:
        """Return all keys, in the order of the file. Raises PreflightError."""
        content = self._read()
        return [KeyLine(digest.hex()[:8], tenant) for _, digest, tenant in read_lines(self._path, content)]

    def create(self, tenant: Tenant) -> str:
        """Add a key for a tenant, and return it: it is written nowhere else.

        A name that has a key already gets another one, with the same limits.

        Raises:
            UserError: the name cannot be used, or its other keys have other limits. PreflightError: the file.
        """
        if not _NAME.fullmatch(tenant.name):
            raise UserError(f"name: {tenant.name[:100]!r}: {_NAME_RULE}")
        key = f"lr_{secrets.token_urlsafe(_KEY_BYTES)}"
        with self._changing():
            content = self._read()
            others = [known for _, _, known in read_lines(self._path, content) if known.name == tenant.name]
            if others and others[0] != tenant:
                raise UserError(
                    f"name: {tenant.name}: has a key with other limits: give the same, or revoke it first "
                    f"(longreach keys revoke {tenant.name})"
                )
            line = " ".join([f"{tenant.name}:{HASHED}{key_digest(key).hex()}", *_options(tenant)])
            separator = "" if not content or content.endswith(b"\n") else "\n"
            self._write(content + f"{separator}{line}\n".encode())
        return key

    def revoke(self, name: str, key_id: str = "") -> int:
        """Remove the keys of a name, or the one whose id begins so; returns how many.

        Raises:
            UserError: there is none. PreflightError: the file.
        """
        with self._changing():
            content = self._read()
            gone = {
                number
                for number, digest, tenant in read_lines(self._path, content)
                if tenant.name == name and digest.hex().startswith(key_id)
            }
            if not gone:
                raise UserError(f"name: {name[:100]!r}: has no {'such ' if key_id else ''}key in {self._path}")
            lines = content.decode("ascii").splitlines(keepends=True)
            self._write("".join(line for number, line in enumerate(lines, start=1) if number not in gone).encode())
        return len(gone)

    def _read(self) -> bytes:
        return read_secret(WHAT, self._path) if self._path.exists() else b""

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let no other process change the file. Raises UserError: the folder cannot be written."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._path.with_name(f"{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, content: bytes) -> None:
        name = ""
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}-", dir=self._path.parent)  # mode 0600
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(name)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"keys file: {self._path}: cannot be written ({error.strerror}): name another with --file")


def _options(tenant: Tenant) -> list[str]:
    """Return what a line says of a tenant after its key."""
    limits = {
        "streams": tenant.max_streams, "queued-jobs": tenant.max_queued_jobs,
        "document-bytes": tenant.max_document_bytes,
    }  # fmt: skip
    found = [f"{name}={value}" for name, value in limits.items() if value is not None]
    return ["admin", *found] if tenant.is_admin else found
