"""A head's store of KV over fake shards, and who keeps account of documents."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Rig, eventually

BLOCK_BYTES = 200  # of two shards


class Events:
    """Notes what it is told; of documents that are `gone`, nothing."""

    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk
        self.account: dict[str, list[bytes]] = {}
        self.pinned: frozenset[bytes] = frozenset()
        self.dropped: list[bytes] = []
        self.gone: set[str] = set()
        self.told: list[tuple[str, int]] = []

    def before_store(self, document_id: str, pinned_len: int, keys: Sequence[bytes]) -> bool:
        if document_id in self.gone:
            return False
        self.told += [(document_id, pinned_len)] * len(keys)
        self.account.setdefault(document_id, []).extend(keys)
        return True

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        assert not self.disk.written.keys() & set(keys), "it is on disk"
        self.dropped += keys

    def retained(self) -> frozenset[bytes]:
        return self.pinned


def settle(rig: Rig) -> None:
    eventually(lambda: not len(rig.store.backlog) and not rig.store.backlog.busy)


def read(rig: Rig, base: int, document_id: str = "", tokens: int = 320, **spec: int) -> None:
    """Read a document and wait until it is stored."""
    rig.run([*range(base, base + tokens), 1], 1, document_id=document_id, **spec)
    settle(rig)


def start(disk: FakeDisk, **store: object) -> Rig:
    rig = Rig(disk=disk, pages=200, **store)
    rig.store.events = Events(disk)
    return rig


def ready(rig: Rig) -> None:
    eventually(lambda: rig.store.max_bytes)
