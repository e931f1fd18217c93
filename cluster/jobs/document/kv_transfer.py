"""Stored KV out of the stores of all nodes into an archive, and out of an archive into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import IO, TYPE_CHECKING

from cluster.common.errors import StageError
from cluster.common.text_format import one_line
from cluster.jobs.document.archive import PIECE_BYTES, ArchivedBlock, ArchiveReader, ArchiveWriter, Member, bad_archive
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import NotReady
from cluster.kv_store.store import KvStore
from protos.stage import stage_pb2 as pb

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle

_READY_AFTER_S = 10.0
_MAX_FILES = 10_000  # of a block


def ready_shards(kv: KvStore) -> list[GrpcStageHandle]:
    """Return a shard of every node. Raises NotReady while there is no pipeline, or it does not answer."""
    if not (shards := kv.node_shards()):
        kv.refresh()
        shards = kv.node_shards()
    if not shards:
        raise not_ready("the pipeline is being started")
    return shards


def not_ready(problem: object) -> NotReady:
    return NotReady(f"stored KV cannot be reached now ({one_line(problem)}): try again", _READY_AFTER_S)


def kv_members(
    writer: ArchiveWriter, documents: DocumentStore, shards: Sequence[GrpcStageHandle], keys: Iterable[str]
) -> Iterator[bytes]:
    """Yield the files of blocks of all nodes as members of an archive, each file once. Raises NotReady."""
    for key in keys:
        names: set[str] = set()
        for shard in shards:
            try:
                for message in (messages := shard.read_kv([bytes.fromhex(key)])):
                    if message.name in names:
                        for _ in _file_data(message, messages):
                            pass
                        continue
                    names.add(message.name)
                    with closing(documents.spool()) as file:
                        size = _receive_file(file, message, messages)
                        yield from writer.member(f"kv/{key}/{message.name}", size, _pieces(file))
            except StageError as error:
                raise not_ready(error) from error


def _receive_file(file: IO[bytes], message: pb.KvFile, following: Iterator[pb.KvFile]) -> int:
    """Write a file of a block, from its first message on; returns its bytes."""
    return sum(file.write(data) for data in _file_data(message, following))


def _file_data(message: pb.KvFile, following: Iterator[pb.KvFile]) -> Iterator[bytes]:
    """Yield the data of one file, from its first message on. Raises StageError."""
    yield message.data
    while not message.is_last:
        if (after := next(following, None)) is None:
            raise StageError(f"{message.name or 'a file'} of stored KV is cut off")
        message = after
        yield message.data


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece


class KvIntake:
    """Puts the files of an archive's blocks into the stores of all nodes.

    Blocks that the stores have are left as they are. Nothing is put there any more once `problem` says why not.
    """

    def __init__(self, kv: KvStore, documents: DocumentStore, blocks: Sequence[ArchivedBlock], problem: str) -> None:
        """
        Args:
            problem: why none of the blocks can be used here; "" if they can.

        Raises:
            NotReady: there is no pipeline.
        """
        self.problem = problem
        self.taken: list[bytes] = []  # keys of blocks that are there
        self._kv = kv
        self._documents = documents
        self._blocks = list(blocks)
        self._at = {block.key: index for index, block in enumerate(blocks)}
        self._shards = ready_shards(kv) if blocks and not problem else []
        self._present = {block.key for block in blocks if kv.index.has(bytes.fromhex(block.key))}
        self._now = -1  # index of the block whose files come
        self._names: set[str] = set()  # of its files
        self._size = 0  # of its files
        self._total = 0

    @property
    def keys(self) -> list[bytes]:
        """The keys of all blocks that may be put into the stores."""
        return [bytes.fromhex(key) for key in self._at] if self._shards else []

    def take(self, member: Member, reader: ArchiveReader) -> None:
        """Read a file of a block, and put it into the stores.

        Raises:
            InvalidJob: it is damaged, or not of a block that comes now. NotReady: a node does not answer.
        """
        key, name = member.block_file()
        index = self._at.get(key, -1)
        if index < max(0, self._now):
            raise member.misplaced()
        if index > self._now:
            self.end_block()
            self._now = index
        if name in self._names or len(self._names) == _MAX_FILES or not member.size:
            raise member.misplaced()
        self._names.add(name)
        self._check_room(member.size)
        if self.problem or key in self._present:
            reader.skip()
            return
        with closing(self._documents.spool()) as file:
            for piece in reader.data():
                file.write(piece)
            self._write(key, name, file, member.size)
        self._size += member.size

    def end_block(self) -> None:
        """Note the block whose last file was read."""
        if self._names and not self.problem:
            block = self._blocks[self._now]
            key, parent = bytes.fromhex(block.key), bytes.fromhex(block.parent)
            if block.key not in self._present and not self._kv.note_imported(key, parent, block.start, self._size):
                self.problem = "pinned documents take all of kv_store.max_bytes"
            self.taken.append(key)
        self._names, self._size = set(), 0

    def _check_room(self, size: int) -> None:
        """Stop before a document would take more than a node may store."""
        self._total += size
        limit = min(self._kv.limits.values(), default=0)
        if not self.problem and self._total > limit:
            self.problem = f"it has more than the {limit} bytes of kv_store.max_bytes"

    def _write(self, key: str, name: str, file: IO[bytes], size: int) -> None:
        """Put a file into the stores of all nodes."""
        for shard in self._shards:
            try:
                reply = shard.write_kv(_messages(bytes.fromhex(key), name, file, size))
            except StageError as error:
                raise not_ready(error) from error
            if reply.damaged:
                raise bad_archive(f"kv/{key}/{name}: {one_line(reply.problem)[:300]}")
            if reply.problem:
                self.problem = f"it cannot be written ({one_line(reply.problem)[:300]})"
                return


def _messages(key: bytes, name: str, file: IO[bytes], size: int) -> Iterator[pb.KvFile]:
    """Yield a file as `GrpcStageHandle.read_kv` does."""
    message, left = pb.KvFile(key=key, name=name), size
    for piece in _pieces(file):
        left -= len(piece)
        message.data, message.is_last = piece, not left
        yield message
        message = pb.KvFile()


def left_out(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return why KV cannot be used here, "" if it can: the first value, by its name, that differs."""
    for name, value in ours.items():
        if theirs[name] != value:
            return f"its {name} is {theirs[name][:80]}, that of this cluster {value[:80]}"
    return ""
