"""Zip and tar files: hostile names are names, bombs and damage are one error."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client.ingest.archives import ArchiveTree, components, open_zip, tar_tree, zip_tree
from cluster.client.ingest.limits import RATIO_FROM, Budget
from cluster.client.ingest.tree import Entry, TreeText, tree_text
from protos.errors import InvalidRequest


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> io.BytesIO:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return data


def read_zip(data: io.BytesIO) -> TreeText:
    budget = Budget(len(data.getvalue()))
    with open_zip(data) as archive:
        return tree_text(zip_tree(archive, budget), budget)


def tar_of(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> io.BytesIO:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data.seek(0)
    return data


def read_tar(data: io.BytesIO) -> TreeText:
    size = len(data.getvalue())
    return tree_text(tar_tree(data, Budget(size)), Budget(size))


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


HOSTILE = ["/etc/passwd", "../../up", "a/../b", "new\nline", "./plain", "esc\x1b[2J"]
SHOWN = [
    r"==> \x2e\x2e/\x2e\x2e/up <==", r"==> \x2f/etc/passwd <==", r"==> a/\x2e\x2e/b <==", r"==> esc\x1b[2J <==",
    r"==> new\nline <==", "==> plain <==",
]  # fmt: skip


def headers(found: TreeText) -> list[str]:
    return [line for line in found.text.splitlines() if line.startswith("==>")]


def test_hostile_names() -> None:
    assert headers(read_zip(zip_of(*[(name, b"x") for name in HOSTILE]))) == SHOWN
    assert headers(read_tar(tar_of(*[(info(name), b"x") for name in HOSTILE]))) == SHOWN


def test_names_that_are_not_utf8_or_have_zeros() -> None:
    data = zip_of(("axb", b"1"), ("cyd", b"2")).getvalue().replace(b"axb", b"a\xffb").replace(b"cyd", b"c\0d")
    assert headers(read_zip(io.BytesIO(data))) == [r"==> a\xffb <==", r"==> c\x00d <=="]
    plain = tarfile.TarInfo("a\udcffb")
    assert headers(read_tar(tar_of((plain, b"1"), mode="w"))) == [r"==> a\xffb <=="]


def test_links_are_counted_and_hard_links_followed() -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    found = read_zip(zip_of(("a", b"x"), (link, b"/etc/passwd")))
    assert (found.files, dict(found.left_out)) == (1, {"link": 1})
    found = read_tar(tar_of(
        (info("a"), b"x"), (info("s", tarfile.SYMTYPE, "/etc/passwd"), b""), (info("h", tarfile.LNKTYPE, "./a"), b""),
        (info("gone", tarfile.LNKTYPE, "../b"), b""), (info("f", tarfile.FIFOTYPE), b""),
        (info("d", tarfile.DIRTYPE), b""),
    ))  # fmt: skip
    assert headers(found) == ["==> a <==", "==> h <=="]
    assert dict(found.left_out) == {"link": 2, "other": 1}


def test_later_members_count_and_conflicts_do_not() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_of(("t/a", b"old"), ("t/a", b"new"), ("t/", b""))
    assert "new" in read_zip(data).text
    for members in ([("a", b""), ("a/b", b"")], [("a/b", b""), ("a", b"")]):
        with pytest.raises(InvalidRequest, match=r"^a: is both a file and a folder"):
            read_zip(zip_of(*members))


def test_a_folder_around_all_is_left_out() -> None:
    assert headers(read_zip(zip_of(("top/a", b"x"), ("top/b/c", b"x")))) == ["==> a <==", "==> b/c <=="]
    assert headers(read_zip(zip_of(("top/a", b"x"), ("b", b"x")))) == ["==> b <==", "==> top/a <=="]
    assert headers(read_zip(zip_of(("../a", b"x")))) == [r"==> \x2e\x2e/a <=="]


def test_ignore_files_hold_in_archives() -> None:
    found = read_zip(zip_of(("t/b.o", b"x"), ("t/a", b"x"), ("t/.gitignore", b"*.o\n"), ("t/.git/config", b"secret")))
    assert headers(found) == ["==> .gitignore <==", "==> a <=="]


def test_archives_in_archives_are_binary() -> None:
    inner = zip_of(("x", b"x")).getvalue()
    assert read_zip(zip_of(("a", b"x"), ("inner.zip", inner))).left_out["binary"] == 1


@pytest.mark.parametrize("fill", [b"a", b"\0"])
def test_bombs(fill: bytes) -> None:
    bomb = fill * (RATIO_FROM + 1)
    said = "unpacks to more than 250 times its size"
    with pytest.raises(InvalidRequest, match=said):
        read_tar(tar_of((info("a"), bomb), mode="w:gz"))
    data = zip_of(("a", bomb), ("b", b"text"))
    if fill == b"\0":
        assert read_zip(data).left_out["binary"] == 1, "it is not unpacked"
    else:
        with pytest.raises(InvalidRequest, match=said):
            read_zip(data)


def test_a_member_that_is_larger_than_it_says_is_not_read_beyond() -> None:
    data = bytearray(zip_of(("a", b"x" * 5000)).getvalue())
    small = (10).to_bytes(4, "little")
    data = bytearray(bytes(data).replace((5000).to_bytes(4, "little"), small))
    with pytest.raises(InvalidRequest, match="damaged zip file"):
        read_zip(io.BytesIO(bytes(data)))


def test_encrypted_members() -> None:
    data = bytearray(zip_of(("a", b"secret")).getvalue())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InvalidRequest, match="is encrypted: unpack it with its password first"):
        read_zip(io.BytesIO(bytes(data)))


def test_too_many_members() -> None:
    with (
        open_zip(zip_of(("a", b"x"), ("b", b"x"))) as archive,
        pytest.raises(InvalidRequest, match="more than 1 files"),
    ):
        zip_tree(archive, Budget(max_files=1))
    with pytest.raises(InvalidRequest, match="more than 1 files"):
        tar_tree(tar_of((info("a"), b""), (info("b"), b"")), Budget(max_files=1))


def outcome(read: Callable[[io.BytesIO], TreeText], data: bytes) -> str:
    try:
        return f"{read(io.BytesIO(data)).files} files"
    except InvalidRequest as error:
        return str(error)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_damage_is_one_error(at: int, noise: bytes) -> None:
    members = [("a.txt", b"some text " * 9), ("b.txt", b"other")]
    whole = zip_of(*members).getvalue()
    packed = tar_of(*[(info(name), content) for name, content in members], mode="w:gz").getvalue()
    for data, read in ((whole, read_zip), (packed, read_tar)):
        place = at % len(data)
        for broken in (data[:place] + noise + data[place + len(noise) :], data[:place]):
            assert len(outcome(read, broken).splitlines()) == 1


def test_gzip_of_no_tar() -> None:
    with pytest.raises(InvalidRequest, match="damaged tar file"):
        tar_tree(io.BytesIO(zlib.compress(b"text", wbits=31)), Budget())


def test_components() -> None:
    assert components(b"./a//b/./c") == (b"a", b"b", b"c")
    assert components(b"/a") == (b"/", b"a")
    assert components(b"./") == ()


def test_find() -> None:
    tree = ArchiveTree()
    tree.add((b"a", b"b"), Entry(b"b", "file"))
    assert tree.find((b"a", b"b")) is not None
    for path in ((b"a",), (b"a", b"c"), (b"a", b"b", b"c"), ()):
        assert tree.find(path) is None
