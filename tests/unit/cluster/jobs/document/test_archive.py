"""Archives: damage, lies and hostile members are refused, and nothing of them is kept."""

from __future__ import annotations

import tarfile

import pytest

from cluster.jobs.model import InvalidJob
from tests.support.fakes.kv import FakeDisk
from tests.support.rigs.archives import (
    LIMIT,
    TEXT,
    OpenBench,
    archive_of,
    changed,
    check_nothing_kept,
    hostile,
    pieces,
    read,
    rebuilt,
)


def test_damage_anywhere(open_bench: OpenBench) -> None:
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
def test_manifests_that_lie(open_bench: OpenBench, values: dict[str, object], problem: str) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    name = read(here)
    archive = changed(archive_of(here, name), **values)
    here.service.documents.delete(name)
    here.service.document_kv.sweep()
    with pytest.raises(InvalidJob, match=problem):
        here.service.import_document(pieces(archive), LIMIT)
    check_nothing_kept(here, disk)


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
def test_hostile_members(open_bench: OpenBench, member: bytes) -> None:
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


def test_members_twice_or_out_of_order(open_bench: OpenBench) -> None:
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
