"""Where there is a compiler the kernels build: otherwise their tests would be skipped without anyone noticing."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from workers.kernels import build
from workers.kernels.abi import Path as InstructionSet
from workers.kernels.build import compiler, kernel_family, library_path, load


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("LONGREACH_KERNELS") == "off", reason="LONGREACH_KERNELS is off")
def test_kernels_build_where_there_is_a_compiler():
    found = load()
    assert found.library is not None, found.reason
    assert found.reason == ""


def test_the_environment_limits_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what another CPU has too; a better one than this CPU has changes nothing."""
    monkeypatch.delenv("LONGREACH_KERNELS", raising=False)
    fastest = build.best_path.__wrapped__()
    best = max(build.paths(), default=None)
    assert fastest is None or fastest == best or (fastest, best) == (InstructionSet.AVX512, InstructionSet.AVX512_BF16)
    for limit in InstructionSet:
        monkeypatch.setenv("LONGREACH_KERNELS", limit.name.lower())
        assert build.best_path.__wrapped__() == (None if best is None else min(best, limit))
    monkeypatch.setenv("LONGREACH_KERNELS", "off")
    assert build.best_path.__wrapped__() is None
    monkeypatch.setenv("LONGREACH_KERNELS", "sse2")
    with pytest.raises(ValueError, match="LONGREACH_KERNELS: 'sse2': must be off, or one of portable, avx2, avx512"):
        build.best_path.__wrapped__()


def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a script that takes its time, and writes down that it was called."""
    script = tmp_path / "compiler"
    script.write_text(
        f"#!/bin/sh\necho called >> {tmp_path}/calls\nsleep 0.3\n"
        'while [ "$1" != "-o" ]; do shift; done\necho library > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:  # a lock belongs to an open file, so that threads stand for processes
        paths = {future.result() for future in [pool.submit(library_path, build=True) for _ in range(4)]}
    (path,) = paths
    assert path.read_text() == "library\n"
    assert (tmp_path / "calls").read_text() == "called\n"
    assert {each.suffix for each in path.parent.iterdir()} == {".so", ".lock"}


COMPILER = '#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\necho library > "$2"\n'


def test_only_a_library_of_ours_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask was and is: what others can write to, or a link to it, is compiled anew."""
    script, cache = tmp_path / "compiler", tmp_path / "cache"
    script.write_text(COMPILER)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = os.umask(0)
    try:
        path = library_path(build=True)
        assert [each.stat().st_mode & 0o777 for each in (path.parent, path)] == [0o700, 0o700]
        planted = tmp_path / "planted"
        for mode in (0o720, 0o702, 0o777):
            path.parent.chmod(0o777)
            path.write_text("planted")
            path.chmod(mode)
            assert library_path(build=True).read_text() == "library\n"
            assert [each.stat().st_mode & 0o777 for each in (path.parent, path)] == [0o755, 0o700]
        planted.write_text("planted")
        path.unlink()
        path.symlink_to(planted)
        assert library_path(build=True).read_text() == "library\n"
        assert planted.read_text() == "planted"
    finally:
        os.umask(before)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4242)
    if os.getuid():
        with pytest.raises(OSError, match="belongs to another user: set XDG_CACHE_HOME"):
            library_path(build=True)


def test_a_failed_build_names_the_reason_and_leaves_the_way_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(OSError, match=r"exit code 1: x\.cpp:1: error: no such thing"):
            library_path(build=True)
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize(("best", "name"), [(InstructionSet.AMX, "amx"), (InstructionSet.PORTABLE, "portable")])
def test_kernels_are_named(monkeypatch: pytest.MonkeyPatch, best: InstructionSet, name: str) -> None:
    monkeypatch.setattr(build, "best_path", lambda: best)
    assert kernel_family(torch.device("cpu")) == name
    monkeypatch.setattr(build, "best_path", lambda: None)
    assert kernel_family(torch.device("cpu")).startswith("torch-")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernel_family(torch.device("cuda", 1)) == "cuda-9.0"
