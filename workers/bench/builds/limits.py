"""Limits of what a compiled kernel may take, and what it must have: the same for every version of Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from workers.bench.builds.readback import Built

CAPABILITIES = (80, 90, 100)  # of data centres: what is built where nothing else is asked for
_KILO = 1024
_RESERVED = _KILO  # bytes of shared memory, by the system for every program
_REGISTERS = 65536  # of a multiprocessor
_THREADS = 32  # of a warp
_OLD_STACK = 64  # bytes, before sm_90
_WARP_UNITS = ("HMMA", "QMMA", "IMMA")  # products of one warp, which have fewer rows


class Generation(NamedTuple):
    """What GPUs of a compute capability have: bytes of shared memory for all programs of a multiprocessor, products."""

    shared: int
    units: tuple[str, ...]


GENERATIONS = {
    80: Generation(164 * _KILO, ("HMMA",)),
    86: Generation(100 * _KILO, ("HMMA",)),
    89: Generation(100 * _KILO, ("HMMA", "QMMA")),
    90: Generation(228 * _KILO, ("HGMMA", "QGMMA")),
    100: Generation(228 * _KILO, ("UTCHMMA", "UTCQMMA")),
    120: Generation(100 * _KILO, ("HMMA", "QMMA")),
}
SHARED = {sm: generation.shared - _RESERVED for sm, generation in GENERATIONS.items()}  # bytes a program may have
_ALL_UNITS = frozenset((*_WARP_UNITS, *(unit for one in GENERATIONS.values() for unit in one.units)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of a kernel beside no stack and no spills; on 8.x some 64 bytes are let pass."""

    stack: int = 0  # bytes at most
    registers: int = 255
    together: int = 1  # programs that a multiprocessor must have room for
    units: str = "any"  # of matrices: `own` of the generation and no others, `some`, or `any`, none included
    copies: int = 0  # asynchronous copies to shared memory, at least
    shuffles: int | None = None  # at most


@dataclass(frozen=True, slots=True)
class Shipped:
    """Launches as a step of a model makes them: `call` makes them for a compute capability such as 90."""

    name: str
    call: Callable[[int], object]
    limits: dict[str, Limits]  # by kernel
    least: int = 80  # the compute capability that they need


def violations(built: Built, limits: Limits, capability: int) -> list[str]:
    """Return what a build takes beyond its limits, one line each; empty where all are kept."""
    found = []

    def check(kept: bool, text: str) -> None:
        if not kept:
            found.append(text)

    stack = max(limits.stack, _OLD_STACK if capability < 90 else 0)
    check(built.stack <= stack, f"{built.stack} bytes of stack: at most {stack}")
    local = built.count("LDL", "STL")
    check(stack > 0 or local == 0, f"{local} accesses to local memory: none allowed")
    check(built.registers <= limits.registers, f"{built.registers} registers: at most {limits.registers}")
    check(built.shared <= SHARED[capability], f"{built.shared} bytes of shared memory: at most {SHARED[capability]}")
    threads = built.warps * _THREADS
    check(
        built.registers * threads * limits.together <= _REGISTERS,
        f"{built.registers} registers of {threads} threads: {limits.together} programs must fit a multiprocessor",
    )
    check(
        limits.together == 1 or (built.shared + _RESERVED) * limits.together <= GENERATIONS[capability].shared,
        f"{built.shared} bytes of shared memory: {limits.together} programs must fit a multiprocessor",
    )
    units = GENERATIONS[capability].units
    own = built.count(*units)
    products = built.count(*_ALL_UNITS)
    check(limits.units != "some" or products > 0, "no matrix products")
    check(limits.units != "own" or 0 < own == products, f"{own} of {products} matrix products by {units[0]}")
    copies = built.count("LDGSTS", "UTMALDG")
    check(copies >= limits.copies, f"{copies} asynchronous copies: at least {limits.copies}")
    shuffles = built.count("SHFL")
    check(limits.shuffles is None or shuffles <= limits.shuffles, f"{shuffles} shuffles: at most {limits.shuffles}")
    return found
