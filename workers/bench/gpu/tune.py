"""Stage `tune`: which library and which tile are the fastest on this card; and the table of cards that this writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from workers.attention import cards
from workers.bench.gpu.context import Case, Context, Sizes
from workers.bench.gpu.journal import Line, read_lines
from workers.bench.gpu.patterns import Pattern, patterns
from workers.bench.gpu.rates.attention import run_dense, run_sparse
from workers.kernels.triton.lists import TILES

_PROOF = ("name", "commit", "torch", "cuda", "packages")  # what a table says about its origin


def cases(context: Context) -> Iterator[Case]:
    """Yield the cases."""
    for dim in context.sizes.dims:
        for library in cards.LIBRARIES:
            yield Case("tune", f"dense {library}, D {dim}", partial(_library, library, dim), 15, 120)
        for tile in TILES:
            yield Case("tune", f"tiles of {tile} rows, D {dim}", partial(_tile, tile, dim), 15, 120)


def _library(library: str, dim: int, context: Context) -> Line:
    return run_dense(context, library, context.sizes.short, dim)


def tiled(sizes: Sizes) -> tuple[Pattern, int]:
    """Return the pattern and the keys that tiles are timed on: offsets that scatter, where the choice matters.

    The keys are many, as on few the heads of such a pattern are dense, whatever their tiles.
    """
    return patterns(sizes)[2], sizes.long


def _tile(tile: int, dim: int, context: Context) -> Line:
    return run_sparse(context, *tiled(context.sizes), tile, dim)


def table_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the lines of a file say of its card, by name and head dim, as `cards.json` has it.

    A head dim has an entry where all libraries were tried and at least one was measured.

    Raises:
        ValueError: there is nothing, or it comes from a rehearsal.
    """
    lines = [line for line in read_lines(path) if line["state"] == "done" and not line.get("rehearsal")]
    facts = [line for line in lines if (line["stage"], line["case"]) == ("env", "card") and line.get("name")]
    tuned = {line["case"]: line for line in lines if line["stage"] == "tune"}
    if not facts or not tuned:
        raise ValueError(f"{path}: needs the lines of the stages env and tune, measured on a GPU")
    entries: dict[str, Any] = {}
    for dim in sorted({line["dim"] for line in tuned.values() if "dim" in line}):
        tried = {name: tuned.get(f"dense {name}, D {dim}") for name in cards.LIBRARIES}
        rates = {name: line["tflops"] for name, line in tried.items() if line is not None and line.get("tflops")}
        tiles = {str(tile): tuned.get(f"tiles of {tile} rows, D {dim}", {}).get("kernel_tflops") for tile in TILES}
        if not rates or cards.OWN not in rates:
            continue
        entries[str(dim)] = {
            "dense": max(rates, key=lambda name: rates[name]),
            "dense_tflops": rates,
            "tile_tflops": {tile: rate for tile, rate in tiles.items() if rate},
            "measured": {name: facts[-1].get(name) for name in _PROOF} | {
                "at": facts[-1]["at"], "driver": facts[-1].get("smi", {}).get("driver_version"),
            },
        }  # fmt: skip
    if not entries:
        raise ValueError(f"{path}: stage tune has no rate of the own kernel: call it again")
    return {facts[-1]["name"]: entries}


def write_table(path: Path, table: Path = cards.TABLE) -> str:
    """Put what a file says into the table of cards; return the name of the card. Raises as `table_of`."""
    found = table_of(path)
    known = json.loads(table.read_text(encoding="utf-8"))
    table.write_text(json.dumps(known | found, indent=1) + "\n", encoding="utf-8")
    return next(iter(found))
