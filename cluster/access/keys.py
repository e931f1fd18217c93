"""API keys: who a key stands for, and the file they are in.

A key is 128 random bits or more, so its SHA-256 cannot be turned back by trying: a slow hash, which protects passwords
that people choose, would only slow every request down.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cluster.common.errors import PreflightError
from cluster.common.secret_files import read_secret
from cluster.common.units import parse_bytes
from cluster.jobs.tenants.tenant import Tenant
from protos.errors import UserError

WHAT = "security.api_keys_file"
MIN_KEY_CHARS = 16
MAX_NAME_CHARS = 100
HASHED = "sha256="  # before the SHA-256 of a key, in hexadecimal digits, where a line has that instead of the key
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OPTIONS = "admin, streams=N, queued-jobs=N, document-bytes=SIZE"


class Keys(Protocol):
    """What the servers need of the API keys."""

    def tenant(self, key: str) -> Tenant | None:
        """Return the tenant of a key, None if it is not one of the keys."""

    def named(self, name: str) -> Tenant | None:
        """Return the tenant of a name, None if it has no key."""


class ApiKeys:
    """The keys that give access. Only their SHA-256 is kept, so that no key can end up in a log or a dump."""

    def __init__(self, keys: Mapping[str, str | Tenant], hashed: Mapping[bytes, Tenant] | None = None) -> None:
        """
        Args:
            keys: by key, its tenant, or the name of one without limits; empty for a key without a name.
            hashed: by SHA-256 of the key, its tenant.
        """
        self._tenants: dict[bytes, Tenant] = dict(hashed or {})
        for key, given in keys.items():
            tenant = Tenant(given) if isinstance(given, str) else given
            digest = key_digest(key)
            self._tenants[digest] = tenant if tenant.name else replace(tenant, name=_short(digest))

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, key: str) -> Tenant | None:
        """Return the tenant of a key, None if it is not one of them.

        One without a name is called by the first digits of the SHA-256 of its key. Takes as long for every key.
        """
        digest, found = key_digest(key), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def named(self, name: str) -> Tenant | None:
        """Return the tenant of a name, None if it has no key."""
        return next((tenant for tenant in self._tenants.values() if tenant.name == name), None)

    @property
    def names(self) -> dict[str, str]:
        """The names of the tenants, by `key_id` of their keys."""
        return {known.hex()[:16]: tenant.name for known, tenant in self._tenants.items()}


def key_digest(key: str) -> bytes:
    """Return the SHA-256 of a key, by which it is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_id(key: str) -> str:
    """Return what tells a key from others and gives nothing of it away."""
    return key_digest(key).hex()[:16]


def load_api_keys(path: Path) -> ApiKeys:
    """Read a keys file: a line a key, empty lines and those that begin with `#` are skipped.

    A line is `NAME:KEY` or `KEY`, `sha256=DIGEST` in the place of a key, and then, between spaces, options: `admin`,
    `streams=N`, `queued-jobs=N`, `document-bytes=SIZE`. Keys of one name have the options of that name together.

    Raises:
        PreflightError: naming file and line, never a key; also when everyone may read the file or it has no key.
    """
    keys = parse_keys(path, read_secret(WHAT, path))
    if not keys:
        raise PreflightError(f"{WHAT}: {path}: has no key; make one with: longreach keys create NAME --file {path}")
    return keys


def parse_keys(path: Path, content: bytes) -> ApiKeys:
    """Return the keys of a file with this content, perhaps none. Raises PreflightError as `load_api_keys`."""
    return ApiKeys({}, {digest: tenant for _, digest, tenant in read_lines(path, content)})


def read_lines(path: Path, content: bytes) -> list[tuple[int, bytes, Tenant]]:
    """Return number, SHA-256 of the key and tenant of each line. Raises PreflightError as `load_api_keys`."""
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        raise PreflightError(f"{WHAT}: {path}: byte {error.start}: must be ASCII text") from None
    found = list(_parse(path, text))
    lines: dict[bytes, int] = {}
    first_of: dict[str, tuple[int, Tenant]] = {}
    for number, digest, tenant in found:
        where = f"{WHAT}: {path}:{number}"
        if digest in lines:
            raise PreflightError(f"{where}: the key of line {lines[digest]} again; each line needs its own")
        line, other = first_of.setdefault(tenant.name, (number, tenant))
        if other != tenant:
            raise PreflightError(f"{where}: other options than in line {line}: keys of one name must have the same")
        lines[digest] = number
    return found


def _parse(path: Path, text: str) -> Iterator[tuple[int, bytes, Tenant]]:
    """Yield number, digest and tenant of each line."""
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, rest = (part.strip() for part in line.rpartition(":"))
        where = f"{WHAT}: {path}:{number}"
        key, *options = rest.split() or [""]
        digest = _read_key(where, key)
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise PreflightError(f"{where}: a name must have at most {MAX_NAME_CHARS} characters, none of control")
        yield number, digest, _with_options(where, Tenant(name or _short(digest)), options)


def _read_key(where: str, key: str) -> bytes:
    """Return the SHA-256 of a key as a line gives it. Raises PreflightError."""
    if key.startswith(HASHED):
        digits = key.removeprefix(HASHED)
        if not _DIGEST.fullmatch(digits):
            raise PreflightError(f"{where}: {HASHED}: must be followed by 64 hexadecimal digits")
        return bytes.fromhex(digits)
    if len(key) < MIN_KEY_CHARS:
        raise PreflightError(
            f"{where}: the key has {len(key)} characters: must have at least {MIN_KEY_CHARS}; "
            "`openssl rand -hex 32` makes one"
        )
    if not key.isprintable():
        raise PreflightError(f"{where}: a key must not contain control characters")
    return key_digest(key)


def _with_options(where: str, tenant: Tenant, options: list[str]) -> Tenant:
    """Return a tenant with what a line says after the key; what is wrong is not repeated: it may be part of a key."""
    for option in options:
        name, _, value = option.partition("=")
        try:
            match name:
                case "admin" if option == name:
                    tenant = replace(tenant, is_admin=True)
                case "streams":
                    tenant = replace(tenant, max_streams=_count(value))
                case "queued-jobs":
                    tenant = replace(tenant, max_queued_jobs=_count(value))
                case "document-bytes":
                    tenant = replace(tenant, max_document_bytes=parse_bytes(value))
                case _:
                    raise ValueError
        except (ValueError, UserError):
            problem = "a key has no spaces, and what follows it must be of"
            raise PreflightError(f"{where}: {problem} {_OPTIONS}") from None
    return tenant


def _count(value: str) -> int:
    number = int(value) if value.isdecimal() else 0
    if not 1 <= number <= 1_000_000:
        raise ValueError
    return number


def _short(digest: bytes) -> str:
    return f"sha256:{digest.hex()[:8]}"
