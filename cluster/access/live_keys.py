"""The keys file of a running head: read again when it changes, so that a key that was revoked stops at once."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from cluster.access.audit import AuditLog
from cluster.access.call_pool import CallEnd, CallPool
from cluster.access.keys import WHAT, ApiKeys, load_api_keys, parse_keys
from cluster.common.errors import PreflightError
from cluster.common.secret_files import read_secret
from cluster.common.watched_thread import WatchedThread
from cluster.jobs.tenants.tenant import Tenant

_LOOK_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class LiveKeys:
    """The keys of a file as it is now, from `start` to `close`.

    A file that cannot be read, or has a line that cannot, changes nothing: the log says so. One without a key leaves
    nobody access.
    """

    def __init__(self, path: Path, streams: CallPool, audit: AuditLog) -> None:
        """Read the file.

        Args:
            streams: calls that may last for hours; those of keys that are gone are ended, see `watch`.

        Raises:
            PreflightError: as `load_api_keys`.
        """
        self._path = path
        self._pools = [streams]
        self._audit = audit
        self._keys = load_api_keys(path)
        self._content = read_secret(WHAT, path)
        self._problem = ""
        self._closing = threading.Event()
        self.thread = WatchedThread(self._run, "keys", self._closing)

    def tenant(self, key: str) -> Tenant | None:
        """Return the tenant of a key, None if it is not one of the keys."""
        return self._keys.tenant(key)

    def named(self, name: str) -> Tenant | None:
        """Return the tenant of a name, None if it has no key."""
        return self._keys.named(name)

    def watch(self, pool: CallPool) -> None:
        """End the calls of keys that are gone in another pool too; called before `start`."""
        self._pools.append(pool)

    @property
    def names(self) -> set[str]:
        """The names of all tenants."""
        return set(self._keys.names.values())

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._closing.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Read the file if it has changed, and end calls of keys that are gone, also those let in meanwhile."""
        try:
            if (content := read_secret(WHAT, self._path)) != self._content:
                self._change(parse_keys(self._path, content))
                self._content = content
            problem = ""
        except (PreflightError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            _log.error("%s: the keys stay as they were", problem)
        self._problem = problem
        known = self._keys.names
        for pool in self._pools:
            for caller in pool.end_where(
                lambda caller: bool(caller.key_id) and caller.key_id not in known,
                CallEnd.REVOKED, "the API key was revoked",
            ):  # fmt: skip
                _log.info("a call of %s was ended: its key was revoked", caller)

    def _change(self, keys: ApiKeys) -> None:
        before, after = self._keys.names, keys.names
        self._keys = keys
        for key_id in before.keys() - after.keys():
            self._audit.note_key("key_revoked", before[key_id])
        for key_id in after.keys() - before.keys():
            self._audit.note_key("key_added", after[key_id])
        if not after:
            _log.warning("%s: %s: has no key any more: nobody has access", WHAT, self._path)
