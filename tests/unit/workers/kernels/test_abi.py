"""The structures, limits and statuses of the C interface are those of the compiled library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from workers.kernels import abi
from workers.kernels.build import best_path, compiler, load, paths

needs_library = pytest.mark.skipif(compiler() is None or load().library is None, reason="no compiled kernels")


@needs_library
def test_the_library_agrees() -> None:
    library = load().library
    assert library is not None
    abi.declare(library)
    assert best_path() in set(abi.Path)


NEEDED = {  # features of a CPU, as Linux names them
    abi.Path.PORTABLE: (),
    abi.Path.AVX2: ("avx2", "fma"),
    abi.Path.AVX512: ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    abi.Path.AVX512_BF16: ("avx512_bf16",),
    abi.Path.AMX: ("amx_tile", "amx_bf16"),
}


@needs_library
@pytest.mark.parametrize("path", list(abi.Path), ids=lambda path: path.name.lower())
def test_instruction_sets_of_this_machine(path: abi.Path) -> None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    absent = [flag for below, flags_of in NEEDED.items() if below <= path for flag in flags_of if flag not in flags]
    if absent:  # the tests of the kernels run every path up to the best one
        pytest.skip(f"kernels of {path.name.lower()} are not tested here: this CPU has no {', '.join(absent)}")
    assert path in paths()


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure with a field that the library does not know."""

    class Grown(ctypes.Structure):
        _fields_ = (*abi.NormCall._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(abi, "_STRUCTURES", tuple(Grown if one is abi.NormCall else one for one in abi._STRUCTURES))


@needs_library
@pytest.mark.usefixtures("grown")
def test_a_structure_that_differs_is_refused() -> None:
    library = load().library
    assert library is not None
    with pytest.raises(RuntimeError, match=r"structures and limits; Grown: 72 and 80$"):
        abi.declare(library)


@needs_library
def test_a_limit_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = load().library
    assert library is not None
    monkeypatch.setattr(abi, "_LIMITS", (*abi._LIMITS[:-1], 7))
    with pytest.raises(RuntimeError, match=r"limit: 128 and 7$"):
        abi.declare(library)
    monkeypatch.setattr(abi, "_LIMITS", abi._LIMITS[:-1])
    with pytest.raises(RuntimeError, match=r"18 and 17 structures and limits"):
        abi.declare(library)


def test_every_structure_is_compared() -> None:
    own = {one for one in vars(abi).values() if isinstance(one, type) and issubclass(one, ctypes.Structure)}
    assert own == set(abi._STRUCTURES)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(abi.Status.NO_MEMORY, MemoryError, "no room"), (abi.Status.INVALID, ValueError, "bad"), (9, ValueError, "bad")],
)
def test_statuses_become_errors(status: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        abi.raise_for_status(status, no_memory="no room", invalid="bad")
    abi.raise_for_status(abi.Status.OK, no_memory="no room", invalid="bad")
