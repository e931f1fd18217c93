"""The folder of stored KV on a node: find, load, store, list and remove blocks, and their files as they are.

    <path>/v1/<first 2 of the hex key>/<hex key>/l0-24_h0-2.safetensors

The file system is the truth: there is no index, several processes may write the same block, and anybody may remove
files at any moment. A block is there for a shard when the files in its folder, of whatever layouts, have all of the
shard's layers and KV heads. A file appears whole under its name or not at all; one that is not what it should be is
removed, and counted. The time of last use is that of the folder of the key.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from protos.stage.messages import KvBlock
from workers.kv.block_file import BlockInfo, BlockReader, BlockShape, Part, write_block
from workers.kv.block_listing import BlockListing, Entry, names, remove_if_empty
from workers.kv.block_pages import BlockPages, Rows
from workers.kv.open_file import BadBlock, open_file, read_ahead

FOLDER = "v1"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ATTEMPTS = 3  # to write a file into a folder that others remove


@dataclass(slots=True)
class Outcome:
    """What became of a call."""

    blocks: int = 0
    num_bytes: int = 0
    damaged: int = 0  # files removed because they were not what they should be
    problem: str = ""  # the first one, one line
    is_full: bool = False

    def add_problem(self, error: Exception) -> None:
        """Note why something was not done."""
        self.is_full |= isinstance(error, OSError) and error.errno in _FULL
        self.problem = self.problem or " ".join(str(error).split()) or type(error).__name__


class BlockStore:
    """The store of one folder, for the layers and KV heads of one shard. Methods may run on several threads."""

    def __init__(self, path: Path, shape: BlockShape, part: Part) -> None:
        """
        Raises:
            OSError: the folder cannot be made, written or made private.
        """
        self.root = path / FOLDER
        self._shape, self._part = shape, part
        self._listing = BlockListing(self.root, shape)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.root.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise PermissionError(errno.EPERM, "belongs to another user", str(self.root))
        if status.st_mode & 0o077:
            self.root.chmod(0o700)
        probe = self.root / _temporary_name()
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        probe.unlink(missing_ok=True)

    # --- blocks of this shard ----------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> int:
        """Return how many of the first blocks are there for this shard, by the names of files."""
        count = 0
        for key in keys:
            if not self._is_covered(self._parts(self._folder(key))):
                break
            count += 1
        return count

    def read_ahead(self, keys: Iterable[bytes]) -> None:
        """Have the system begin to read the files that `load` will want of blocks."""
        own = list(self._part.cells())
        for folder in map(self._folder, keys):
            parts = (part for part in self._parts(folder) if any(part.has(*cell) for cell in own))
            read_ahead(folder / part.name for part in parts)

    def load(self, block: KvBlock, pages: BlockPages) -> Outcome:
        """Read one block into its pages, which hold anything when it fails.

        Raises:
            ValueError: its pages are not those of a block.
        """
        rows, folder, outcome = pages.rows(block.pages, len(block.token_ids)), self._folder(block.key), Outcome()
        left = set(self._part.cells())
        try:
            for part in self._best_first(self._parts(folder)):
                cells = [cell for cell in part.cells() if cell in left]
                if cells:
                    left.difference_update(self._load_file(folder / part.name, block, cells, pages, rows, outcome))
            if left:
                raise FileNotFoundError(f"block {block.key.hex()[:16]}: not in the store for every layer and head")
            pages.flush()
            os.utime(folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: of the device
            outcome.add_problem(error)
            return outcome
        outcome.blocks = 1
        return outcome

    def _load_file(
        self, path: Path, block: KvBlock, cells: Sequence[tuple[int, int]], pages: BlockPages, rows: Rows,
        outcome: Outcome,
    ) -> list[tuple[int, int]]:  # fmt: skip
        """Read layers and heads from one file; returns those that were read: none of a bad file, which is removed."""
        try:
            reader = BlockReader(path, self._shape, asked=BlockInfo.of(block))
            reader.check(block)
            for layer, head in cells:
                arrays = reader.read(layer, head)
                at = (layer - self._part.layers.start, head - self._part.heads.start)
                pages.write(*at, rows, arrays)
                outcome.num_bytes += sum(array.nbytes for array in arrays)
        except BadBlock as error:
            _remove(path)
            outcome.damaged += 1
            outcome.add_problem(error)
            return []
        except FileNotFoundError:
            return []
        return list(cells)

    def store(self, block: KvBlock, pages: BlockPages) -> Outcome:
        """Write one block from its pages, unless it is there.

        Raises:
            ValueError: its pages are not those of a block.
        """
        rows, part, outcome = pages.rows(block.pages, len(block.token_ids)), self._part, Outcome()
        folder = self._folder(block.key)
        first_layer, first_head = part.layers.start, part.heads.start
        try:
            if not self._is_covered(self._parts(folder)):
                with self._new_file(folder, part.name) as descriptor:
                    outcome.num_bytes = write_block(
                        descriptor, self._shape, part, BlockInfo.of(block),
                        lambda layer, head: pages.read(layer - first_layer, head - first_head, rows),
                    )  # fmt: skip
            outcome.blocks = 1
        except (OSError, RuntimeError) as error:
            outcome.num_bytes = 0
            outcome.add_problem(error)
        return outcome

    # --- blocks of all shards ----------------------------------------------------------------------------------------

    def count(self) -> int:
        """Return how many blocks there are, usable or not."""
        return sum(len(names(self.root / prefix)) for prefix in names(self.root) if len(prefix) == 2)

    def entries(self) -> Iterator[Entry]:
        """Yield all blocks; what writers that have ended left behind is removed."""
        return self._listing.entries()

    def touch(self, keys: Iterable[bytes]) -> int:
        """Note that blocks are used now; returns how many of them are there."""
        count = 0
        for key in keys:
            with contextlib.suppress(OSError):
                os.utime(self._folder(key), follow_symlinks=False)
                count += 1
        return count

    def free_bytes(self) -> int:
        """Return what the disk has left for this user."""
        return shutil.disk_usage(self.root).free

    def identity(self) -> str:
        """Return a text that is equal for shards that see the same store, on whatever nodes."""
        path = self.root / "id"
        if text := (path.read_text(errors="replace")[:64] if path.is_file() else ""):
            return text
        descriptor, temporary = self._temporary(self.root)
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(16))
            try:
                os.link(temporary, path)
            except OSError:
                if not path.exists() or not path.stat().st_size:  # no hard links, or a power cut has left it empty
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_text(errors="replace")[:64]

    def drop(self, keys: Iterable[bytes]) -> Outcome:
        """Remove blocks with all that is in their folders."""
        outcome = Outcome()
        for key in keys:
            folder = self._folder(key)
            try:
                is_there = os.path.lexists(folder)
                _remove(folder)
                outcome.blocks += is_there
            except OSError as error:
                outcome.add_problem(error)
            remove_if_empty(folder.parent)
        return outcome

    # --- the files as they are ---------------------------------------------------------------------------------------

    def files(self, key: bytes) -> list[Path]:
        """Return the files of a block."""
        folder = self._folder(key)
        return [folder / part.name for part in self._parts(folder)]

    def pieces(self, path: Path, size: int) -> Iterator[bytes]:
        """Yield the content of a file in pieces of at most `size` bytes; nothing when it is gone or is no file."""
        try:
            descriptor = open_file(path)
        except (BadBlock, OSError):
            return
        try:
            while piece := os.read(descriptor, size):
                yield piece
        finally:
            os.close(descriptor)

    def receive(self, key: bytes, name: str, pieces: Iterator[bytes]) -> int:
        """Write a file of a block from its pieces, all of which are read; returns its bytes.

        Raises:
            BadBlock: name or content are not those of a file of this model's blocks; nothing is kept.
            OSError: it cannot be written.
        """
        part = Part.parse(name)
        if len(key) != 32 or part is None or not self._shape.contains(part):
            _drain(pieces)
            raise BadBlock(f"{name[:80]!r}: not a name of a file of this model")
        limit, size, folder = self._shape.max_bytes(part), 0, self._folder(key)
        with self._new_file(folder, name, check=True) as descriptor:
            try:
                for piece in pieces:
                    size += len(piece)
                    if size > limit:
                        raise BadBlock(f"{name}: more than {limit} bytes")
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(descriptor, view) :]
            finally:
                _drain(pieces)
        return size

    # --- folders -----------------------------------------------------------------------------------------------------

    def _folder(self, key: bytes) -> Path:
        text = key.hex()
        return self.root / text[:2] / text

    def _parts(self, folder: Path) -> list[Part]:
        """Return the parts of this model that a folder has files of."""
        parts = map(Part.parse, names(folder))
        return [part for part in parts if part is not None and self._shape.contains(part)]

    def _is_covered(self, parts: Sequence[Part]) -> bool:
        """Return whether parts have every layer and head of this shard."""
        if self._part in parts:
            return True
        return all(any(part.has(*cell) for part in parts) for cell in self._part.cells())

    def _best_first(self, parts: Sequence[Part]) -> list[Part]:
        """Return parts, first those that have most of this shard: the fewest files are opened."""
        own = set(self._part.cells())
        return sorted(parts, key=lambda part: -sum(cell in own for cell in part.cells()))

    @contextlib.contextmanager
    def _new_file(self, folder: Path, name: str, check: bool = False) -> Iterator[int]:
        """Give the descriptor of a new file, which gets its name when it is written, or is removed.

        Args:
            check: verify it before.
        """
        descriptor, temporary = self._temporary(folder)
        try:
            try:
                yield descriptor
            finally:
                os.close(descriptor)  # some file systems tell of a full disk only now
            if check:
                self._verify(temporary, folder / name)
            try:
                os.replace(temporary, folder / name)
            except (IsADirectoryError, NotADirectoryError):
                _remove(folder / name)
                os.replace(temporary, folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            remove_if_empty(folder)
            raise

    def _temporary(self, folder: Path) -> tuple[int, Path]:
        """Return a new file that only this user can read. Raises OSError."""
        for attempt in range(_ATTEMPTS):
            path = folder / _temporary_name()
            try:
                for parent in (folder.parent, folder):
                    with contextlib.suppress(FileExistsError):
                        parent.mkdir(mode=0o700)
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path
            except FileNotFoundError:  # somebody removes empty folders
                if attempt == _ATTEMPTS - 1:
                    raise
            except NotADirectoryError:  # something else is in its place
                _remove(folder)
        raise OSError(errno.EBUSY, "folders change all the time", str(folder))

    def _verify(self, temporary: Path, path: Path) -> None:
        """Raise BadBlock unless the temporary file is what a file of this path must be."""
        BlockReader(temporary, self._shape, path).verify()


def _temporary_name() -> str:
    return f".{secrets.token_hex(8)}.tmp"


def _drain(pieces: Iterator[bytes]) -> None:
    for _ in pieces:
        pass


def _remove(path: Path) -> None:
    """Remove whatever is there, never what a link leads to; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            for _ in range(_ATTEMPTS):  # somebody may write into it meanwhile
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    return
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        path.unlink()
