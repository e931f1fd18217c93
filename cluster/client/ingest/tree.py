"""A folder of text and code as one text: a listing, then every file under a header with its path.

The text depends on names and contents alone: files in byte order of their paths, what the tree's own `.gitignore` files
leave out and every `.git` skipped, links not followed. So a checkout, its zip and its tar are the same document.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cluster.client.ingest.ignore import FILE_NAME, IgnoreRules
from cluster.client.ingest.limits import Budget
from cluster.client.ingest.text import NotText, decode, is_binary
from protos.errors import InvalidRequest

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much (0: unknown)
HEAD_BYTES = 8000  # by which binary files are told
MAX_DEPTH = 200  # folders in each other
ROOT = b"/"  # as first component of an absolute path
_KINDS = {"binary": "binary file", "link": "symbolic link", "other": "special file", "ignored": "ignored entry"}


class Tree(Protocol):
    """A folder on disk or in an archive."""

    def entries(self) -> Sequence[Entry]:
        """Return what is in it, in any order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file (`read` returns its first bytes, at most as many as asked for), a folder, a "link" or "other"."""

    name: bytes
    kind: str
    read: Callable[[int], bytes] = lambda limit: b""
    tree: Tree | None = None


@dataclass(frozen=True, slots=True)
class DiskTree:
    """A folder on disk."""

    path: bytes

    def entries(self) -> Sequence[Entry]:
        """Return what is in it. Raises InvalidRequest when it cannot be read."""
        with reading(self.path), os.scandir(self.path) as found:
            return [self._entry(entry) for entry in found]

    def _entry(self, entry: os.DirEntry[bytes]) -> Entry:
        if entry.is_symlink():
            return Entry(entry.name, "link")
        if entry.is_dir(follow_symlinks=False):
            return Entry(entry.name, "folder", tree=DiskTree(entry.path))
        if not entry.is_file(follow_symlinks=False):
            return Entry(entry.name, "other")
        return Entry(entry.name, "file", lambda limit: _read_file(entry.path, limit))


@contextmanager
def reading(path: bytes | str | os.PathLike[str], verb: str = "read") -> Iterator[None]:
    """Turn errors of the system in the block into InvalidRequest: PATH cannot be read."""
    try:
        yield
    except InvalidRequest:
        raise
    except (OSError, ValueError) as error:  # a ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"{show_path([os.fsencode(path)])}: cannot be {verb} ({reason})") from error


def _read_file(path: bytes, limit: int) -> bytes:
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidRequest(f"{show_path([path])}: is a file no longer")
            return file.read(limit)


@dataclass(slots=True)
class TreeText:
    """The text of a tree, and what was left out: counts by kind, and encodings other than UTF-8."""

    text: str
    files: int
    left_out: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know, a line each."""
        counts = [f"{n:,} {_KINDS[kind]}{'s' if n > 1 else ''}" for kind, n in sorted(self.left_out.items())]
        counts = [count.replace("entrys", "entries") for count in counts]
        found = f"{self.files:,} file{'s' if self.files > 1 else ''}"
        lines = [found + (f"; left out: {', '.join(counts)}" if counts else "")]
        if self.encodings:
            kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(self.encodings.items()))
            lines.append(f"not UTF-8: {kinds} (taken as such)")
        return tuple(lines)


def tree_text(tree: Tree, budget: Budget, progress: Progress | None = None) -> TreeText:
    """Return the text of a tree. Raises InvalidRequest: nothing in it is text, it is too large or cannot be read."""
    listing: list[str] = ["Files:"]
    bodies: list[str] = []
    result = TreeText("", 0)
    above: tuple[bytes, ...] = ()
    for path, entry in walk(tree, result.left_out):
        budget.add_file()
        try:
            text, encoding = _read_text(entry, budget)
        except NotText:
            result.left_out["binary"] += 1
            continue
        if encoding != "utf-8":
            result.encodings[encoding.removesuffix("-sig")] += encoding != "utf-8-sig"
        result.files += 1
        shared = _common(above, path[:-1])
        listing += [f"{'  ' * depth}{show_path([path[depth]])}/" for depth in range(shared, len(path) - 1)]
        listing.append(f"{'  ' * (len(path) - 1)}{show_path(path[-1:])}")
        above = path[:-1]
        bodies.append(section(show_path(path), text))
        if progress is not None:
            progress("reading files", result.files, 0)
    if not result.files:
        raise InvalidRequest("has no text file")
    result.encodings = +result.encodings
    result.text = "\n".join([*listing, "", *bodies])
    return result


def section(name: str, text: str) -> str:
    """Return a text under a header, ending with a line break."""
    return f"==> {name} <==\n{text}" + ("" if text.endswith("\n") or not text else "\n")


def _common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _read_text(entry: Entry, budget: Budget) -> tuple[str, str]:
    """Return text and encoding of a file. Raises NotText for a binary one, of which only the beginning is read."""
    data = entry.read(HEAD_BYTES)
    if is_binary(data):
        raise NotText("is binary")
    if len(data) == HEAD_BYTES:
        data = entry.read(budget.left + 1)
    budget.spend(len(data))
    return decode(data)


def walk(tree: Tree, left_out: Counter[str]) -> Iterator[tuple[tuple[bytes, ...], Entry]]:
    """Yield (components of its path, file) of all that is not ignored, in byte order of paths; counts what is left out.

    Raises:
        InvalidRequest: folders lie too deep in each other, or cannot be read.
    """
    return _walk(tree, (), IgnoreRules(), left_out)


def _walk(
    tree: Tree, above: tuple[bytes, ...], rules: IgnoreRules, left_out: Counter[str]
) -> Iterator[tuple[tuple[bytes, ...], Entry]]:
    if len(above) > MAX_DEPTH:
        raise InvalidRequest(f"has more than {MAX_DEPTH} folders in each other")
    entries = [entry for entry in tree.entries() if entry.name != b".git"]
    for entry in entries:
        if entry.name == FILE_NAME and entry.kind == "file":
            rules = rules.inside(len(above), entry.read(1 << 20))
    for entry in sorted(entries, key=lambda entry: entry.name + (b"/" if entry.kind == "folder" else b"")):
        path = (*above, entry.name)
        if rules.ignores(path, entry.kind == "folder"):
            left_out["ignored"] += 1
        elif entry.tree is not None:
            yield from _walk(entry.tree, path, rules, left_out)
        elif entry.kind == "file":
            yield path, entry
        else:
            left_out[entry.kind] += 1


def show_path(path: Sequence[bytes]) -> str:
    r"""Return a path as the text shows it, on one line: what is not printable, not UTF-8, a backslash, and what would
    lead out of the folder (`..`, a slash at the beginning) as escapes such as `\x2e`.
    """
    return "/".join(_show_component(part) for part in path)


def _show_component(part: bytes) -> str:
    if part in (b"..", b".", ROOT):
        return "".join(f"\\x{byte:02x}" for byte in part)
    shown = []
    for char in part.decode("utf-8", "surrogateescape"):
        if "\udc80" <= char <= "\udcff":
            shown.append(f"\\x{ord(char) - 0xDC00:02x}")
        else:
            shown.append(char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode())
    return "".join(shown)


def folder_text(path: Path, budget: Budget, progress: Progress | None = None) -> TreeText:
    """Return the text of a folder on disk. Raises InvalidRequest."""
    try:
        return tree_text(DiskTree(os.fsencode(path)), budget, progress)
    except InvalidRequest as error:
        known = str(error).startswith(str(path))
        raise InvalidRequest(str(error) if known else f"{path}: {error}") from error
