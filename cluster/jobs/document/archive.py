"""The file of an exported document: a plain tar that is written and read in one pass, with bounded memory.

    manifest.json         what the document is, and what its tokens and KV were computed by
    text                  its bytes
    ids                   its token ids, uint32, little-endian; only where there is a tokenizer
    kv/<hex key>/<file>   the files of stored blocks, in the order of the manifest
    SHA256SUMS            of all members before it, in their order, as sha256sum writes it

A reader takes the members in this order only, and every header, padding and the end must be byte by byte what the
writer makes: so links, devices, owners and extensions of tar are refused, and nothing is ever unpacked to a name.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

from pydantic import TypeAdapter, ValidationError

from cluster.common.text_format import escape_unprintable
from cluster.jobs.model import InvalidJob, check_id
from protos.jobs.limits import MAX_UINT32

VERSION = 1
FORMAT = "longreach document"
MANIFEST, TEXT, IDS, SUMS = "manifest.json", "text", "ids", "SHA256SUMS"
PIECE_BYTES = 1 << 20
_MAX_MANIFEST = 8 << 20  # bytes; 40,000 blocks
_BLOCK = 512  # of tar
_END = bytes(2 * _BLOCK)
_KEY = re.compile(r"[0-9a-f]{64}")
_SHORT = re.compile(r"[ -~]{0,200}")
_FILE = re.compile(r"kv/([0-9a-f]{64})/(l[0-9]{1,5}-[0-9]{1,5}_h[0-9]{1,5}-[0-9]{1,5}\.safetensors)")


@dataclass(frozen=True, slots=True)
class ArchivedBlock:
    """A stored block; keys are hexadecimal, of the first one the parent is empty."""

    key: str
    parent: str
    start: int


@dataclass(frozen=True, slots=True)
class ArchivedModel:
    """What the KV of an archive depends on besides the tokens; `root` is a digest of it all but the kernels."""

    fingerprint: str
    dtype: str
    kv_dtype: str
    positions: str
    sparse: str
    root: str
    kernel_family: str


@dataclass(frozen=True, slots=True)
class ArchivedDocument:
    """The record of a document, as far as it means the same elsewhere; see `DocumentRecord`."""

    id: str
    name: str
    size_bytes: int
    tokens: int
    scale_len: int
    source_hash: str
    parent: str
    seams: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive says of itself."""

    document: ArchivedDocument
    model: ArchivedModel
    tokenizer: str  # digest of what the ids depend on; empty: there are none
    block_tokens: int
    blocks: tuple[ArchivedBlock, ...]

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read what `to_json` wrote, and check all of it. Raises InvalidJob."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise bad_archive(f"{MANIFEST} cannot be read") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise bad_archive(f"no file that `longreach docs export` wrote (format must be {FORMAT!r})")
        if (version := values.get("version")) != VERSION:
            raise bad_archive(f"version {str(version)[:20]}: must be {VERSION}: export it again, or upgrade")
        try:
            manifest = _MANIFEST.validate_json(data, strict=True)
        except (ValidationError, RecursionError) as error:
            raise bad_archive(f"{MANIFEST}: a value is missing or of another type") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        document, model = self.document, self.model
        check_id(document.id, "doc")
        if document.parent:
            check_id(document.parent, "doc")
        for name, value in (
            ("size_bytes", document.size_bytes), ("tokens", document.tokens), ("scale_len", document.scale_len),
            ("block_tokens", self.block_tokens),
        ):  # fmt: skip
            _check_value(name, 0 <= value <= MAX_UINT32)
        _check_value("size_bytes", document.size_bytes > 0)
        edges = (0, *document.seams, document.size_bytes)
        _check_value("seams", not document.seams or all(a < b for a, b in pairwise(edges)))
        _check_value("source_hash", not document.source_hash or bool(_KEY.fullmatch(document.source_hash)))
        _check_value("tokenizer", not self.tokenizer or bool(_KEY.fullmatch(self.tokenizer)))
        _check_value("model", all(_SHORT.fullmatch(value) for value in asdict(model).values()))
        starts: dict[str, int] = {}
        for block in self.blocks:
            is_new = bool(_KEY.fullmatch(block.key)) and block.key not in starts
            after = starts[block.parent] + self.block_tokens if block.parent in starts else 0
            is_first = not block.parent and not block.start
            _check_value("blocks", is_new and self.block_tokens > 0 and (is_first or block.start == after > 0))
            starts[block.key] = block.start


_MANIFEST = TypeAdapter(Manifest)


class ArchiveWriter:
    """Makes an archive, member by member."""

    def __init__(self) -> None:
        self._sums: list[str] = []

    def member(self, name: str, size: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield a member; `pieces` have `size` bytes together."""
        digest, left = hashlib.sha256(), size
        yield _header(name, size)
        for piece in pieces:
            digest.update(piece)
            left -= len(piece)
            yield piece
        assert not left, f"{name}: {left} bytes are missing"
        yield bytes(-size % _BLOCK)
        self._sums.append(_sum(name, digest))

    def end(self) -> Iterator[bytes]:
        """Yield what comes after the last member."""
        sums = "".join(self._sums).encode()
        yield from (_header(SUMS, len(sums)), sums, bytes(-len(sums) % _BLOCK), _END)


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in pieces of PIECE_BYTES, the last one shorter."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= PIECE_BYTES:
            yield bytes(memoryview(buffer)[:PIECE_BYTES])
            del buffer[:PIECE_BYTES]
    if buffer:
        yield bytes(buffer)


@dataclass(frozen=True, slots=True)
class Member:
    """A member whose data come next."""

    name: str
    size: int

    def block_file(self) -> tuple[str, str]:
        """Return key (hexadecimal) and name of a file of stored KV. Raises InvalidJob: it is something else."""
        found = _FILE.fullmatch(self.name)
        if found is None:
            raise self.misplaced()
        return found[1], found[2]

    def misplaced(self) -> InvalidJob:
        """Return the error for a member that must not be here."""
        return bad_archive(
            f"member {escape_unprintable(self.name)[:120]!r}: not at its place, or one that must not be there"
        )


class ArchiveReader:
    """Reads an archive from its bytes; every method raises InvalidJob for what is not as it must be."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")
        self._sums, self._sums_size = hashlib.sha256(), 0
        self._member: Member | None = None  # whose data are to be read

    def manifest(self) -> Manifest:
        """Return the manifest, which comes first."""
        first = self.next()
        if first is None or first.name != MANIFEST or first.size > _MAX_MANIFEST:
            raise bad_archive(f"no file that `longreach docs export` wrote (it must begin with {MANIFEST})")
        return Manifest.from_json(b"".join(self.data()))

    def next(self) -> Member | None:
        """Return the next member, whose `data` must be read; None when all was read and agrees with its checksums."""
        assert self._member is None, "the data of the last member are not read"
        header = self._read(_BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")  # type: ignore[arg-type, unused-ignore]
            is_ours = header == _header(info.name, info.size)
        except (tarfile.HeaderError, ValueError) as error:
            raise bad_archive("damaged, or no file that `longreach docs export` wrote") from error
        if not is_ours:
            raise bad_archive(
                f"member {escape_unprintable(info.name)[:120]!r}: a link, a device, or otherwise not ours"
            )
        if info.name == SUMS:
            self._check_end(info.size)
            return None
        self._member = Member(info.name, info.size)
        return self._member

    def data(self) -> Iterator[bytes]:
        """Yield the data of the member that `next` has returned, in pieces of at most those of the source."""
        member, digest = self._member, hashlib.sha256()
        assert member is not None
        for piece in self._take(member.size):
            digest.update(piece)
            yield piece
        self._check_zero(-member.size % _BLOCK)
        line = _sum(member.name, digest).encode()
        self._sums.update(line)
        self._sums_size += len(line)
        self._member = None

    def skip(self) -> None:
        """Read the data, and check them with the others."""
        for _ in self.data():
            pass

    def _check_end(self, size: int) -> None:
        """Check the sums of all members, and that nothing follows."""
        digest = hashlib.sha256()
        if size == self._sums_size:
            for piece in self._take(size):
                digest.update(piece)
        if size != self._sums_size or digest.digest() != self._sums.digest():
            raise bad_archive("damaged: its content does not agree with its checksums: copy or export it again")
        self._check_zero(-size % _BLOCK)
        self._check_zero(len(_END))
        if len(self._rest) or any(len(piece) for piece in self._pieces):
            raise bad_archive("something follows its end: copy or export it again")

    def _check_zero(self, size: int) -> None:
        if any(self._read(size)):
            raise bad_archive("damaged: copy or export it again")

    def _read(self, size: int) -> bytes:
        return b"".join(self._take(size))

    def _take(self, size: int) -> Iterator[bytes]:
        """Yield the next bytes, `size` of them together."""
        while size:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    raise bad_archive("cut off: copy or export it again")
                self._rest = memoryview(piece)
            taken = self._rest[:size]
            self._rest = self._rest[size:]
            size -= len(taken)
            if taken:
                yield bytes(taken)


def _header(name: str, size: int) -> bytes:
    """Return the header of a member. Raises ValueError: name or size are too long for it."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _sum(name: str, digest: hashlib._Hash) -> str:
    return f"{digest.hexdigest()}  {name}\n"


def _check_value(name: str, is_right: bool) -> None:
    if not is_right:
        raise bad_archive(f"{MANIFEST}: {name}: out of range: export it again")


def bad_archive(problem: str) -> InvalidJob:
    return InvalidJob(f"archive: {problem}")
