"""Folders as one text: the same files give the same bytes, hostile names stay on their line."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.client.ingest.archives import open_zip, tar_tree, zip_tree
from cluster.client.ingest.limits import Budget
from cluster.client.ingest.tree import DiskTree, Entry, folder_text, section, show_path, tree_text, walk
from protos.errors import InvalidRequest

names = st.text(st.sampled_from("aZ.-_ é0"), min_size=1, max_size=4).filter(lambda name: name.strip("."))
contents = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn"]), max_size=20)
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(tuple), contents, min_size=1, max_size=8)


def without_conflicts(files: dict[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Without files that are also folders."""
    folders = {path[:end] for path in files for end in range(1, len(path))}
    return {path: text for path, text in files.items() if path not in folders}


def write(folder: Path, files: dict[tuple[str, ...], str]) -> None:
    for path, text in files.items():
        at = folder.joinpath(*path)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(text.encode())


def tar_of(files: dict[tuple[str, ...], str], top: str, mode: str) -> io.BytesIO:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        for path, text in files.items():
            member = tarfile.TarInfo("/".join((top, *path)))
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    data.seek(0)
    return data


@settings(max_examples=50, deadline=None)
@given(trees.map(without_conflicts), st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]))
def test_folder_zip_and_tar_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, ...], str], mode: str
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    write(folder, files)
    expected = folder_text(folder, Budget()).text
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, text in reversed(files.items()):
            archive.writestr("/".join(("top", *path)), text)
    with open_zip(packed) as opened:
        assert tree_text(zip_tree(opened, Budget()), Budget()).text == expected
    assert tree_text(tar_tree(tar_of(files, "./top", mode), Budget()), Budget()).text == expected
    # every file is there, under its path and in byte order
    headers = [line for line in expected.split("\n") if line.startswith("==> ")]
    shown = sorted("/".join(path).encode() for path in files)
    assert [header.encode() for header in headers if header.endswith(" <==")] == [b"==> " + s + b" <==" for s in shown]


def test_what_the_text_looks_like(tmp_path: Path) -> None:
    write(tmp_path, {
        ("README.md",): "# Hello\n", ("src", "main.c"): "int main;", ("src", "lib", "a.c"): "", ("src.txt",): "x\n",
        (".git", "config"): "secret", ("sub", ".git"): "gitdir: elsewhere", (".gitignore",): "*.o\nbuild/\n",
        ("src", "main.o"): "object", ("build", "out"): "output", ("build", ".gitignore"): "!out\n",
    })  # fmt: skip
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "mark.txt").write_bytes("\ufeffmark".encode())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7 text for once")
    (tmp_path / "link.txt").symlink_to("README.md")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe")
    found = folder_text(tmp_path, Budget())
    assert found.text == (
        "Files:\n.gitignore\nREADME.md\nlatin.txt\nmark.txt\nsrc.txt\nsrc/\n  lib/\n    a.c\n  main.c\n\n"
        "==> .gitignore <==\n*.o\nbuild/\n\n==> README.md <==\n# Hello\n\n==> latin.txt <==\nGröße\n\n"
        "==> mark.txt <==\nmark\n\n==> src.txt <==\nx\n\n==> src/lib/a.c <==\n\n==> src/main.c <==\nint main;\n"
    )
    assert found.notes() == (
        "7 files; left out: 2 binary files, 2 ignored entries, 2 symbolic links, 1 special file",
        "not UTF-8: 1 latin-1 (taken as such)",
    )


def test_the_place_and_the_name_of_a_folder_are_not_in_the_text(tmp_path: Path) -> None:
    for name in ("one", "two/deeper"):
        write(tmp_path / name, {("a",): "text"})
    assert folder_text(tmp_path / "one", Budget()).text == folder_text(tmp_path / "two/deeper", Budget()).text


def test_folders_that_are_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{tmp_path}: has no text file$"):
        folder_text(tmp_path, Budget())
    write(tmp_path, {("a",): "12345", ("b",): "6", ("c", "d"): "7"})
    with pytest.raises(InvalidRequest, match=rf"^{tmp_path}: has more than 2 files"):
        folder_text(tmp_path, Budget(max_files=2))
    with pytest.raises(InvalidRequest, match=rf"^{tmp_path}: has more than 0 MiB of text"):
        folder_text(tmp_path, Budget(max_bytes=6))
    monkeypatch.setattr("cluster.client.ingest.tree.MAX_DEPTH", 0)
    with pytest.raises(InvalidRequest, match="more than 0 folders in each other"):
        folder_text(tmp_path, Budget())


def test_files_that_go_away_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    ((_, entry),) = list(walk(DiskTree(os.fsencode(tmp_path)), Counter()))
    (tmp_path / "a").unlink()
    with pytest.raises(InvalidRequest, match="a: cannot be read"):
        entry.read(10)
    (tmp_path / "a").symlink_to("/etc/passwd")
    with pytest.raises(InvalidRequest, match="a: cannot be read"):
        entry.read(10)


def test_only_the_beginning_of_a_binary_file_is_read() -> None:
    asked = []

    def read(limit: int) -> bytes:
        asked.append(limit)
        return b"\0" * limit

    class One:
        def entries(self) -> list[Entry]:
            return [Entry(b"big", "file", read), Entry(b"text", "file", lambda limit: b"x")]

    assert tree_text(One(), Budget()).left_out["binary"] == 1
    assert max(asked) < 10_000


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ([b"a b", "é".encode()], "a b/é"), ([b"a\nb"], r"a\nb"), ([b"a\0b"], r"a\x00b"), ([b"\xff.txt"], r"\xff.txt"),
        ([b"a\\nb"], r"a\\nb"), ([b"..", b"etc"], r"\x2e\x2e/etc"), ([b"/", b"etc"], r"\x2f/etc"),
        ([b"\x1b[2J"], r"\x1b[2J"), (["\u202egpj".encode()], r"\u202egpj"),
    ],
)  # fmt: skip
def test_names_are_shown_on_one_line(path: list[bytes], shown: str) -> None:
    assert show_path(path) == shown


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_names_stay_apart(one: bytes, other: bytes) -> None:
    assert show_path([one]).isprintable()
    assert (show_path([one]) == show_path([other])) == (one == other)


def test_sections() -> None:
    assert section("a", "x") == "==> a <==\nx\n" == section("a", "x\n")
    assert section("a", "") == "==> a <==\n"
