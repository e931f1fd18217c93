"""Zip and tar files as trees. Nothing is written to disk, so a hostile name is only a name."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from cluster.client.ingest.limits import Budget
from cluster.client.ingest.text import is_binary
from cluster.client.ingest.tree import HEAD_BYTES, ROOT, Entry, Tree, show_path
from cluster.common.text_format import one_line
from protos.errors import InvalidRequest

_UTF8_NAME = 0x800  # flag of a zip member
_ENCRYPTED = 0x1
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    IndexError,  # of zipfile, by a name of no characters
)  # fmt: skip


@dataclass(slots=True)
class ArchiveTree:
    """A folder in an archive."""

    found: dict[bytes, Entry] = field(default_factory=dict)

    def entries(self) -> Sequence[Entry]:
        """Return what is in it."""
        return list(self.found.values())

    def add(self, path: Sequence[bytes], entry: Entry) -> None:
        """Put an entry at its place; of two with one name the later one counts, as when they are unpacked."""
        here = self
        for index, name in enumerate(path[:-1]):
            inner = here.found.get(name)
            if inner is None:
                inner = here.found[name] = Entry(name, "folder", tree=ArchiveTree())
            if not isinstance(inner.tree, ArchiveTree):
                raise InvalidRequest(f"{show_path(path[: index + 1])}: is both a file and a folder")
            here = inner.tree
        present = here.found.get(path[-1])
        if present is not None and present.tree is not None:
            if entry.tree is None:
                raise InvalidRequest(f"{show_path(path)}: is both a file and a folder")
            return
        here.found[path[-1]] = entry

    def find(self, path: Sequence[bytes]) -> Entry | None:
        """Return the file at a path."""
        here: Tree | None = self
        entry = None
        for name in path:
            entry = here.found.get(name) if isinstance(here, ArchiveTree) else None
            here = entry.tree if entry is not None else None
        return entry if entry is not None and entry.tree is None else None

    def without_top(self) -> ArchiveTree:
        """Return the only folder at the top, if there is nothing beside it, else this tree: archives often have one."""
        if len(self.found) == 1:
            (entry,) = self.found.values()
            if isinstance(entry.tree, ArchiveTree) and entry.name not in (b"..", ROOT):
                return entry.tree
        return self


def components(name: bytes) -> tuple[bytes, ...]:
    """Return the components of a path in an archive; of an absolute one the first is `ROOT`."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return tuple([ROOT, *parts] if name.startswith(b"/") else parts)


@contextmanager
def open_zip(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Open a zip file; whatever is wrong with it, then or later in the block, becomes InvalidRequest."""
    with _damage("zip"), zipfile.ZipFile(file) as archive:
        yield archive


def zip_tree(archive: zipfile.ZipFile, budget: Budget) -> Tree:
    """Return the tree of a zip file, whose members are read while it is open."""
    top = ArchiveTree()
    for info in archive.infolist():
        budget.add_file()
        path = components(_raw_name(info))
        if not path:
            continue
        mode = info.external_attr >> 16
        if info.is_dir():
            top.add(path, Entry(path[-1], "folder", tree=ArchiveTree()))
        elif stat.S_ISLNK(mode):
            top.add(path, Entry(path[-1], "link"))
        else:
            top.add(path, Entry(path[-1], "file", _ZipReader(archive, info)))
    return top.without_top()


@dataclass(frozen=True, slots=True)
class _ZipReader:
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def __call__(self, limit: int) -> bytes:
        if self.info.flag_bits & _ENCRYPTED:
            raise InvalidRequest("is encrypted: unpack it with its password first")
        with self.archive.open(self.info) as member:
            return member.read(limit)


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a member's name, which zipfile cuts at a zero byte and decodes as cp437 without a flag."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437", "surrogateescape")


def tar_tree(file: BinaryIO, budget: Budget) -> Tree:
    """Return the tree of a tar file, packed by gzip, bzip2, xz or not at all; its text files are in memory.

    Raises:
        InvalidRequest: it is damaged, or there is too much in it.
    """
    top = ArchiveTree()
    total = 0
    with _damage("tar"), tarfile.open(fileobj=file, mode="r:*", errors="surrogateescape") as archive:
        for member in archive:
            budget.add_file()
            total += max(0, member.size)
            budget.check_unpacked(total)
            path = components(member.name.encode("utf-8", "surrogateescape"))
            if not path:
                continue
            top.add(path, _tar_entry(archive, member, path[-1], top, budget))
    return top.without_top()


def _tar_entry(
    archive: tarfile.TarFile, member: tarfile.TarInfo, name: bytes, top: ArchiveTree, budget: Budget
) -> Entry:
    if member.isdir():
        return Entry(name, "folder", tree=ArchiveTree())
    if member.issym():
        return Entry(name, "link")
    if member.islnk():  # a hard link: the content of an earlier member
        first = top.find(components(member.linkname.encode("utf-8", "surrogateescape")))
        return Entry(name, "link") if first is None else Entry(name, first.kind, first.read)
    content = archive.extractfile(member) if member.isreg() else None
    if content is None:
        return Entry(name, "other")
    with content:
        data = content.read(HEAD_BYTES)
        if not is_binary(data):
            data += content.read(budget.left + 1)
    budget.hold(len(data))
    return Entry(name, "file", lambda limit: data[:limit])


@contextmanager
def _damage(kind: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest:
        raise
    except RuntimeError as error:  # zipfile's word for a password it lacks
        raise InvalidRequest(f"is a {kind} file that cannot be read ({one_line(error)})") from error
    except _DAMAGE as error:
        raise InvalidRequest(f"is a damaged {kind} file ({one_line(error, 200) or type(error).__name__})") from error
