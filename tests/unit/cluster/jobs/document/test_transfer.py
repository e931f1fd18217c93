"""Documents out of one head and into another: text, tokens and KV, and nothing of an import that fails."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.common.errors import StageError
from cluster.jobs.document.archive import ArchiveWriter
from cluster.jobs.document.token_file import tokens_path
from cluster.jobs.model import InvalidJob, JobInput, JobNotFound, JobSpec, JobState, NotReady
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

TEXT = b"The code of dark river is 1. " * 60
LIMIT = 1 << 20


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.close()


@pytest.fixture
def open_bench(benches: list[Bench], tmp_path: Path) -> Callable[..., Bench]:
    def make(disk: FakeDisk | None) -> Bench:
        bench = Bench(tmp_path / f"head-{len(benches)}", disk=disk)
        benches.append(bench)
        return bench

    return make


def ask(bench: Bench, document_id: str) -> int:
    """Return how many tokens of the prompt of a question were cached."""
    spec = JobSpec(JobInput(document_id, ("What is it?",)), AnswerOptions(max_tokens=2))
    job = bench.service.submit(spec)
    record = bench.service.wait(job.id, 20)
    assert record.state is JobState.SUCCEEDED, record.error
    return record.answers[0].cached_tokens


def read(bench: Bench, text: bytes = TEXT) -> str:
    """Add a document and ask about it, so that its KV is stored; returns its id."""
    document = bench.service.add_document("river", [text], LIMIT, source_hash="ab" * 32)
    assert ask(bench, document.id) == 0
    bench.runtime.kv_store.backlog.wait_empty(10)
    eventually(lambda: bool(bench.service.stored_kv([document.id])) or (bench.service.document_kv.flush() or False))
    return document.id


def archive_of(bench: Bench, document_id: str, with_kv: bool = True) -> bytes:
    return b"".join(bench.service.export_document(document_id, with_kv))


def pieces(archive: bytes, size: int = 1000) -> Iterator[bytes]:
    return (archive[at : at + size] for at in range(0, len(archive), size))


def check_nothing_kept(bench: Bench, disk: FakeDisk | None, *kept: bytes) -> None:
    assert bench.service.documents.list() == []
    assert list((bench.folder / "documents").iterdir()) == []
    if disk is not None:
        eventually(lambda: set(disk.written) == set(kept))
        bench.service.document_kv.flush()
        eventually(lambda: bench.store.orphan_kv() == [])


def test_round_trip(open_bench: Callable[..., Bench]) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    name = read(here)
    archive = archive_of(here, name)
    assert archive == archive_of(here, name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
        sums = tar.extractfile("SHA256SUMS").read().decode().splitlines()  # type: ignore[union-attr]
        content = {member: tar.extractfile(member).read() for member in names[:-1]}  # type: ignore[union-attr]
    assert names[:3] == ["manifest.json", "text", "ids"]
    assert sums == [f"{hashlib.sha256(data).hexdigest()}  {member}" for member, data in content.items()]
    assert {member.split("/")[1] for member in names[3:-1]} == {key.hex() for key in disk.written}

    record = there.service.import_document(pieces(archive), LIMIT)
    original = here.service.documents.get(name)
    fields = ("id", "name", "size_bytes", "tokens", "scale_len", "source_hash", "parent", "seams", "kernel_family")
    assert [getattr(record, field) for field in fields] == [getattr(original, field) for field in fields]
    assert there.service.documents.read(name) == TEXT
    assert set(other.written) == set(disk.written)
    assert there.service.stored_kv([name])[name][0] == here.service.stored_kv([name])[name][0]
    ids = [tokens_path(bench.service.documents.path(name)).read_bytes() for bench in (here, there)]
    assert ids[0] == ids[1]
    stored = 64 * len(disk.written)
    assert 0 < stored - 64 <= ask(there, name) <= stored
    there.service.documents.delete(name)
    there.service.document_kv.sweep()
    check_nothing_kept(there, other)


def rebuilt(archive: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """Return an archive with other members, and checksums that agree."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()[:-1]}  # type: ignore[union-attr]
    change(members)
    writer = ArchiveWriter()
    made = [piece for name, data in members.items() for piece in writer.member(name, len(data), [data])]
    return b"".join([*made, *writer.end()])


def changed(archive: bytes, **values: object) -> bytes:
    """Return an archive whose manifest says something else; names are those of the manifest or of its parts."""

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        for name, value in values.items():
            part = next(part for part in (manifest, manifest["document"], manifest["model"]) if name in part)
            part[name] = value
        members["manifest.json"] = json.dumps(manifest).encode()

    return rebuilt(archive, change)


def test_damage_anywhere(open_bench: Callable[..., Bench]) -> None:
    other = FakeDisk()
    here, there = open_bench(FakeDisk()), open_bench(other)
    archive = archive_of(here, read(here))
    for at in range(0, len(archive), 151):
        damaged = bytearray(archive)
        damaged[at] ^= 0x10
        with pytest.raises(InvalidJob, match=r"^(archive|document|doc id): .*$"):
            there.service.import_document(pieces(bytes(damaged)), LIMIT)
    check_nothing_kept(there, other)
    for end in range(0, len(archive), 1021):
        with pytest.raises(InvalidJob, match=r"^archive: (cut off|no file)"):
            there.service.import_document(pieces(archive[:end]), LIMIT)
    with pytest.raises(InvalidJob, match="follows its end"):
        there.service.import_document(pieces(archive + b"x"), LIMIT)
    check_nothing_kept(there, other)
    there.service.import_document(pieces(archive, 7), LIMIT)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"version": 2}, "version 2: must be 1"),
        ({"format": "x"}, "no file that"),
        ({"seams": [5, 5]}, "seams"),
        ({"seams": [9999]}, "seams"),
        ({"seams": [10]}, "other content"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"size_bytes": 10}, "text is missing"),
        ({"id": "doc_" + "0" * 32}, "other content"),
        ({"id": "../x"}, "doc id"),
        ({"parent": "/etc"}, "doc id"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": 1 << 40}, "tokens"),
        ({"tokens": 7}, "ids is missing"),
        ({"scale_len": "many"}, "of another type"),
        ({"tokenizer": ""}, "member 'ids'"),
        ({"kernel_family": "a\nb"}, "model"),
        ({"blocks": [{"key": "00" * 32, "parent": "", "start": 64}]}, "blocks"),
        ({"blocks": [{"key": "00" * 32, "parent": "11" * 32, "start": 64}]}, "blocks"),
        ({"blocks": [{"key": "00" * 32, "parent": "", "start": 0}] * 2}, "blocks"),
        ({"blocks": [{"key": "x", "parent": "", "start": 0}]}, "blocks"),
        ({"blocks": []}, "member 'kv/"),
    ],
)
def test_manifests_that_lie(open_bench: Callable[..., Bench], values: dict[str, object], problem: str) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    name = read(here)
    archive = changed(archive_of(here, name), **values)
    here.service.documents.delete(name)
    here.service.document_kv.sweep()
    with pytest.raises(InvalidJob, match=problem):
        here.service.import_document(pieces(archive), LIMIT)
    check_nothing_kept(here, disk)


def hostile(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info.tobuf(fmt)


@pytest.mark.parametrize(
    "member",
    [
        hostile("text", tarfile.SYMTYPE),
        hostile("text", tarfile.LNKTYPE),
        hostile("text", tarfile.CHRTYPE),
        hostile("text", tarfile.FIFOTYPE),
        hostile("text", tarfile.DIRTYPE),
        hostile("text", tarfile.XHDTYPE, 1 << 32),
        hostile("text", tarfile.GNUTYPE_SPARSE),
        hostile("text", size=1 << 40, fmt=tarfile.GNU_FORMAT),
        hostile("text" * 100, fmt=tarfile.GNU_FORMAT),
        hostile("../../etc/passwd"),
        hostile("/etc/passwd"),
        bytes(512),
        b"\xff" * 512,
    ],
)
def test_hostile_members(open_bench: Callable[..., Bench], member: bytes) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    name = read(here, TEXT)
    archive = archive_of(here, name)
    kept = set(disk.written)
    second = archive.index(b"text\0")
    for at in (0, second, len(archive) - 2048):
        with pytest.raises(InvalidJob, match=r"^archive: "):
            here.service.import_document([archive[:at], member, archive[at:]], LIMIT)
    with pytest.raises(InvalidJob):
        here.service.import_document([archive[:second], member * 3000], LIMIT)
    assert set(disk.written) == kept
    assert here.service.documents.get(name).id == name


def test_members_twice_or_out_of_order(open_bench: Callable[..., Bench]) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    archive = archive_of(here, read(here))

    def reverse(members: dict[str, bytes]) -> None:
        kv = {name: members.pop(name) for name in list(members) if name.startswith("kv/")}
        members.update(reversed(kv.items()))

    def foreign(members: dict[str, bytes]) -> None:
        members["kv/" + "00" * 32 + "/l0-1_h0-1.safetensors"] = b"x"

    def text_again(members: dict[str, bytes]) -> None:
        members["text "] = b"x"

    def of_no_block(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.startswith("kv/"))
        members[name.replace("l0-1", "../l0-1")] = members.pop(name)

    def bad_block(members: dict[str, bytes]) -> None:
        members[list(members)[-1]] = b"not a block"

    for change in (reverse, foreign, text_again, of_no_block, bad_block):
        with pytest.raises(InvalidJob, match=r"^archive: "):
            there.service.import_document(pieces(rebuilt(archive, change)), LIMIT)
        check_nothing_kept(there, other)
    with pytest.raises(InvalidJob, match="max_document_bytes"):
        there.service.import_document(pieces(archive), len(TEXT) - 1)
    check_nothing_kept(there, other)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("fingerprint", "other", "model"),
        ("kv_dtype", "int8", "type of KV"),
        ("dtype", "bfloat16", "type of computation"),
        ("positions", "yarn", "positions"),
        ("sparse", "sparse", "sparse"),
        ("root", "00", "all settings"),
        ("block_tokens", 512, "block_tokens"),
    ],
)
def test_kv_of_something_else_is_left_out(
    open_bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, name: str, value: object, problem: str
) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    document = read(here)
    archive = archive_of(here, document)
    if name == "block_tokens":
        blocks = [{"key": key.hex(), "parent": "", "start": 0} for key in disk.written]
        archive = changed(archive, block_tokens=value, blocks=blocks)
        archive = rebuilt(archive, lambda members: [members.pop(n) for n in list(members) if n[:3] == "kv/"] and None)
    else:
        archive = changed(archive, **{name: value})
    assert there.service.import_document(pieces(archive), LIMIT).tokens
    (line,) = [record.getMessage() for record in caplog.records if "without its KV" in record.getMessage()]
    assert problem in line
    assert other.written == {}
    assert ask(there, document) == 0


def test_kernels_of_another_family(open_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here = open_bench(disk)
    document = read(here)
    archive = archive_of(here, document)
    monkeypatch.setattr("tests.support.fakes.runtime.FakeRuntime.kernel_family", "small")
    there = open_bench(other)
    assert there.service.import_document(pieces(archive), LIMIT).kernel_family == "fake"
    assert ask(there, document) >= 64 * (len(disk.written) - 1)
    job = there.service.jobs([], {}, 1, "")[0][0]
    assert job.reproducibility["versions"]["kernels"] == "fake"
    again = archive_of(there, document)
    assert json.loads(again[512 : again.index(b"\0", 512)])["model"]["kernel_family"] == "fake"
    monkeypatch.undo()
    home = open_bench(FakeDisk())
    assert home.service.import_document(pieces(again), LIMIT).kernel_family == ""
    assert ask(home, document) >= 64 * (len(disk.written) - 1)


def test_a_document_that_is_here_keeps_its_kernels(
    open_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = open_bench(FakeDisk())
    archive = archive_of(here, read(here))
    monkeypatch.setattr("tests.support.fakes.runtime.FakeRuntime.kernel_family", "small")
    other = FakeDisk()
    there = open_bench(other)
    document = read(there)
    own = set(other.written)
    assert there.service.import_document(pieces(archive), LIMIT).kernel_family == ""
    assert set(other.written) == own
    assert "kernels (ours): delete it" in caplog.text
    assert ask(there, document) > 0


def test_without_kv_and_without_a_store(open_bench: Callable[..., Bench]) -> None:
    here, there, bare = open_bench(FakeDisk()), open_bench(FakeDisk()), open_bench(None)
    document = read(here)
    with pytest.raises(JobNotFound):
        here.service.export_document("doc_" + "0" * 32, True)
    small, whole = archive_of(here, document, with_kv=False), archive_of(here, document)
    assert b"kv/" not in small
    for archive, bench in ((small, there), (whole, bare)):
        assert bench.service.import_document(pieces(archive), LIMIT).tokens
        assert bench.service.documents.read(document) == TEXT
        assert bench.service.stored_kv([document]) == {}
    assert b"kv/" not in archive_of(bare, document)


def test_ids_of_another_tokenizer_are_not_used(open_bench: Callable[..., Bench]) -> None:
    here, there = open_bench(None), open_bench(None)
    document = here.service.add_document("a", [TEXT], LIMIT).id
    archive = changed(archive_of(here, document), tokenizer="00" * 32)
    archive = rebuilt(archive, lambda members: members.update(ids=bytes(len(members["ids"]))))
    assert there.service.import_document(pieces(archive), LIMIT).tokens == 0
    eventually(lambda: there.service.documents.get(document).tokens > 0)
    ids = [tokens_path(bench.service.documents.path(document)).read_bytes() for bench in (here, there)]
    assert ids[0] == ids[1]
    wrong = rebuilt(archive_of(here, document), lambda members: members.update(ids=b"\xff" * len(members["ids"])))
    with pytest.raises(InvalidJob, match="a token that this model does not have"):
        there.service.import_document(pieces(wrong), LIMIT)


def test_appended_documents(open_bench: Callable[..., Bench]) -> None:
    here, there = open_bench(FakeDisk()), open_bench(FakeDisk())
    first = read(here)
    longer = here.service.add_document("", [b"And so on."], LIMIT, append_to=first)
    ask(here, longer.id)
    record = there.service.import_document(pieces(archive_of(here, longer.id)), LIMIT)
    assert (record.id, record.parent, record.seams) == (longer.id, first, (len(TEXT),))
    longest = [bench.service.add_document("", [b" End."], LIMIT, append_to=longer.id).id for bench in (here, there)]
    assert longest[0] == longest[1]


def test_a_node_that_fails(open_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    document = read(here)
    archive = archive_of(here, document)
    shard = type(there.runtime.shard)
    write, read_kv, calls = shard.write_kv, shard.read_kv, []

    def failing(self: object, given: object) -> object:
        calls.append(given)
        if len(calls) % 3 == 0:
            raise StageError("stage 0 shard 0: gone")
        return (write if self is there.runtime.shard else read_kv)(self, given)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "write_kv", failing)
    monkeypatch.setattr(shard, "read_kv", failing)
    with pytest.raises(NotReady, match="gone"):
        there.service.import_document(pieces(archive), LIMIT)
    check_nothing_kept(there, other)
    calls.clear()
    with pytest.raises(NotReady, match="gone"):
        archive_of(here, document)
    monkeypatch.undo()
    monkeypatch.setattr(there.runtime.kv_store, "node_shards", list)
    with pytest.raises(NotReady, match="being started"):
        there.service.import_document(pieces(archive), LIMIT)
    monkeypatch.undo()
    there.service.import_document(pieces(archive), LIMIT)
    assert set(other.written) == set(disk.written)


def test_a_full_disk_and_a_quota(open_bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    here, full, small = (
        open_bench(FakeDisk()),
        open_bench(FakeDisk(is_full=True)),
        open_bench(FakeDisk(free_bytes=9999)),
    )
    document = read(here)
    archive = archive_of(here, document)
    for bench, problem in ((full, "No space left"), (small, "kv_store.max_bytes")):
        assert bench.service.import_document(pieces(archive), LIMIT).tokens
        assert problem in caplog.text
        eventually(lambda bench=bench: bench.runtime.disk.written == {})  # type: ignore[misc]
        assert bench.service.stored_kv([document]) == {}


def test_an_upload_that_breaks_off_and_a_crash(open_bench: Callable[..., Bench]) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    archive = archive_of(here, read(here))

    def cut(error: BaseException) -> Iterator[bytes]:
        yield archive[:-3000]
        assert other.written
        raise error

    with pytest.raises(InvalidJob, match="cut"):
        there.service.import_document(cut(InvalidJob("request: cut off")), LIMIT)
    check_nothing_kept(there, other)

    def crash() -> Iterator[bytes]:
        yield archive[:-3000]
        there.service.document_kv.sweep()
        assert other.written, "what is being imported is no orphan"
        there.service.document_kv._kv = type("Gone", (), {"is_enabled": False})()  # nothing is dropped any more
        raise SystemExit

    with pytest.raises(SystemExit):
        there.service.import_document(crash(), LIMIT)
    assert other.written
    there.restart()
    there.service.document_kv.sweep()
    check_nothing_kept(there, other)


def test_blocks_that_are_here_stay_as_they_are(open_bench: Callable[..., Bench]) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    document = read(here)
    archive = archive_of(here, document)
    before = dict(disk.blocks)
    assert here.service.import_document(pieces(archive), LIMIT).id == document
    assert all(disk.blocks[key] is block for key, block in before.items())
    with pytest.raises(InvalidJob):
        here.service.import_document(pieces(archive[:-1500]), LIMIT)
    assert set(disk.written) == set(before)
