"""`.gitignore` files: our answer is git's, over random trees and patterns."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.client.ingest.ignore import IgnoreRules
from cluster.client.ingest.tree import DiskTree, walk

NAMES = ["a", "b", "ab", "a.c", "foo", " x", "#h", "!n", "[q]", "sub"]
PATTERNS = [
    "*", "/*", "*/", "**", "**/", "a", "/a", "a/", "/a/", "!a", "!a/", "!*/", "!*.c", "*.c", "a/b", "a/*", "a/**",
    "**/b", "a/**/b", "!/a", "sub/", "!sub/", "foo/*", "!foo/a", "[ab]", "[!a]", "?", "a?", "\\!n", "\\#h", "#h", "!n",
    " x", "a/ ", "b ", "b\\ ", "[", "[]", "[a", "\\[q\\]", "**a", "a**", "/", "//", "a//b", "!", "\\", "a\\",
    "[[:alpha:]]", "[[:alnum:]_]", "[[:nope:]]", "!sub/a", "sub/**", "!sub/**/a", "/sub/*/", "*/a", "foo/**/", "",
]  # fmt: skip
NO_SETTINGS = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
lines = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4)
ignore_files = st.dictionaries(st.sampled_from(["", "a", "foo", "sub", "a/b"]), lines, min_size=1)


def write_tree(folder: Path, files: set[str], ignoring: dict[str, list[str]]) -> None:
    for name in sorted(files):
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        except OSError:  # a folder of this name, or a file in place of a folder
            continue
    for name, lines in ignoring.items():
        if (folder / name).is_dir():
            (folder / name / ".gitignore").write_text("\n".join(lines))


def kept(folder: Path) -> set[str]:
    return {b"/".join(path).decode() for path, _ in walk(DiskTree(os.fsencode(folder)), Counter())}


@pytest.mark.skipif(shutil.which("git") is None, reason="git says what is right")
@settings(max_examples=40, deadline=None)
@given(st.sets(paths, min_size=4, max_size=14), ignore_files)
def test_what_git_ignores_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], ignoring: dict[str, list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    write_tree(folder, files, ignoring)
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True, env=os.environ | NO_SETTINGS)
    listing = [*git, "ls-files", "-z", "-co", "--exclude-per-directory=.gitignore"]
    out = subprocess.run(listing, check=True, capture_output=True, env=os.environ | NO_SETTINGS).stdout
    assert kept(folder) == {name for name in out.decode().split("\0") if name}


@pytest.mark.parametrize(
    ("content", "path", "expected"),
    [
        (b"\xef\xbb\xbfa\n", b"a", True),
        (b"a\r\n", b"a", True),
        (b"caf\xc3\xa9\n", "café".encode(), True),
        (b"# a\n\n", b"a", False),
        (b"*\n!a\n", b"a", False),
        (b"[[:digit:]]\n", b"7", True),
        (b"[[:space:]]\n", b"7", False),
    ],
)
def test_lines(content: bytes, path: bytes, expected: bool) -> None:
    assert IgnoreRules().inside(0, content).ignores([path], is_folder=False) == expected


def test_deeper_files_come_first() -> None:
    rules = IgnoreRules().inside(0, b"*.log\n").inside(1, b"!keep.log\n")
    assert not rules.ignores([b"sub", b"keep.log"], is_folder=False)
    assert rules.ignores([b"sub", b"other.log"], is_folder=False)


def test_odd_brackets_warn_nobody(recwarn: pytest.WarningsRecorder) -> None:
    IgnoreRules().inside(0, b"[[a]\n[a--b]\n[a||b]\n")
    assert not recwarn.list
