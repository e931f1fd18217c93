"""The table of all shipped builds: compiled one by one, checked against their limits, written as JSON and Markdown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from protos.node.environment import build_id, write_result
from workers.bench.builds.launches import compiled_launches
from workers.bench.builds.limits import CAPABILITIES, Limits, Shipped, violations

_MIX = (
    "HMMA", "QMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "UTMALDG", "LDG", "LDS", "STS", "SHFL", "MUFU",
    "F2F", "F2FP", "LDL", "STL",
)  # fmt: skip
_COLUMNS = ("launches", "kernel", "sm", "warps", "registers", "stack", "shared", "instructions", "mix", "violations")


def compile_all(capabilities: Sequence[int] = CAPABILITIES, only: str = "") -> Iterator[dict[str, Any]]:
    """Yield a row a kernel, launches and compute capability; launches with `only` in their name.

    What cannot be compiled has a row with the reason in `violations`.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: its interpreter is on.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: 1: interpreted kernels cannot be compiled; unset it")
    from workers.bench.builds.shipped import shipped

    chosen = [one for one in shipped() if only in one.name]
    if not chosen:
        raise ValueError(f"--only: {only}: no launches have it in their name")
    todo = [(one, sm) for sm in capabilities for one in chosen if sm >= one.least]
    for done, (one, capability) in enumerate(todo, 1):
        begin = time.monotonic()
        yield from _rows(one, capability)
        print(
            f"[{done}/{len(todo)}] {one.name}, sm_{capability}: {time.monotonic() - begin:.1f} s", file=sys.stderr,
            flush=True,
        )  # fmt: skip


def _rows(one: Shipped, capability: int) -> Iterator[dict[str, Any]]:
    try:
        launches = compiled_launches(partial(one.call, capability), capability)
    except Exception as error:  # noqa: BLE001  a compiler's error of any kind is a row of the table
        text = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        yield {"launches": one.name, "kernel": "", "sm": capability, "violations": [f"not compiled: {text[0]}"]}
        return
    for kernel, built in launches:
        yield {
            "launches": one.name, "kernel": kernel, "sm": capability, "warps": built.warps,
            "registers": built.registers, "stack": built.stack, "shared": built.shared,
            "instructions": built.instructions.total(),
            "mix": {name: built.count(name) for name in _MIX if built.count(name)},
            "violations": violations(built, one.limits.get(kernel, Limits()), capability),
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """Return a row as one line of a terminal."""
    if "registers" not in row:
        return f"{row['launches']}, sm_{row['sm']}: {row['violations'][0]}"
    text = f"{row['launches']}, {row['kernel']}, sm_{row['sm']}: {row['registers']} registers, {row['shared']} B shared"
    return " ".join([text, *(f"! {one}" for one in row["violations"])])


def markdown(rows: Sequence[dict[str, Any]], version: str) -> str:
    """Return the table in Markdown."""
    lines = [
        f"Triton {version}: registers and stack a thread, shared memory a program; nothing ran on a GPU.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for row in rows:
        mix = " ".join(f"{name} {count}" for name, count in row.get("mix", {}).items())
        cells = {**row, "mix": mix, "violations": "; ".join(row["violations"])}
        lines.append("| " + " | ".join(str(cells.get(name, "")) for name in _COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def rows_of(path: Path, version: str) -> list[dict[str, Any]]:
    """Return the rows of a file of `write`; none where it is missing, or of other code or another Triton."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    is_ours = found["triton"] == version and found["environment"]["build"] == build_id()
    return list(found["rows"]) if is_ours else []


def write(path: Path, rows: list[dict[str, Any]], version: str, **facts: object) -> None:
    """Write rows to `path` as JSON, and beside it as Markdown."""
    write_result(path, {"what": "compile", "triton": version, "rows": rows}, **facts)
    path.with_suffix(".md").write_text(markdown(rows, version))
