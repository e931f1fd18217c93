"""Print a file of the benchmark: where it was measured, every figure, and the targets with what was reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.attention import cards
from workers.bench.gpu.journal import Line, read_lines

Found = Mapping[tuple[str, str], Line]
_H200 = "NVIDIA H200"
_FIGURES = (
    "ok", "ms", "low", "high", "repeats", "tflops", "of_matmul", "gbs", "of_copy", "share", "kernel_tflops",
    "kernel_of_matmul", "ratio", "seconds", "tokens", "peak_bytes", "ms_a_token", "times_least", "graphs",
    "dense_a_layer", "sparse_a_layer", "launches", "why",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is wanted: at least or at most `must`, better `aim`; `only_on` cards whose name has this."""

    what: str
    value: Callable[[Found], float | None]
    must: float
    aim: float | None
    at_least: bool = True
    only_on: str = ""


def _at(stage: str, case: str, name: str, factor: float = 1.0) -> Callable[[Found], float | None]:
    def value(found: Found) -> float | None:
        got = found.get((stage, case), {}).get(name)
        return None if got is None else float(got) * factor

    return value


def _best_of_libraries(found: Found) -> float | None:
    """Return the rate of what is used over that of the fastest one tried, at 1M keys.

    Used is what the table of cards names, else the first of flash-attn, cuDNN and our own that runs.
    """
    rates = {name: found.get(("kernels", f"dense {name} 1M D 128"), {}).get("tflops") for name in cards.LIBRARIES}
    known = {name: rate for name, rate in rates.items() if rate}
    table = json.loads(cards.TABLE.read_text(encoding="utf-8"))
    named = table.get(found.get(("env", "card"), {}).get("name"), {}).get("128", {}).get("dense")
    order = (cards.FLASH_ATTN, cards.CUDNN, cards.OWN) if named is None else (named,)
    shipped = next((known[name] for name in order if name in known), None)
    return shipped / max(known.values()) if known and shipped else None


def _sparse_gain(found: Found) -> float | None:
    """Return the time of the own dense kernel over that of everything sparse, for a cell at 1M keys.

    Staging is done once for the four cells of a step.
    """
    dense = found.get(("kernels", "dense own 1M D 128"), {}).get("ms")
    parts: list[float] = [
        found.get(("kernels", name), {}).get("ms") or 0.0
        for name in ("vertical-slash 1M, pattern 1", "estimate, selection, recall 1M", "staging 1M int8")
    ]
    if dense is None or not all(parts):
        return None
    attention, selection, staging = parts
    return dense / (attention + selection + staging / 4)


def _whole(case: str) -> Callable[[Found], float | None]:
    def value(found: Found) -> float | None:
        line = found.get(("prefill", case), {})
        return float(line["seconds"]) if line.get("is_whole") and line.get("seconds") else None

    return value


def _part(part: str) -> Callable[[Found], float | None]:
    def value(found: Found) -> float | None:
        return found.get(("kernels", "estimate, selection, recall 1M"), {}).get("parts_ms", {}).get(part)

    return value


TARGETS = (
    Target("dense own, 64K keys: share of matmul", _at("kernels", "dense own 64K D 128", "of_matmul"), 0.55, 0.70),
    Target("dense own, 1M keys: share of matmul", _at("kernels", "dense own 1M D 128", "of_matmul"), 0.55, 0.70),
    Target("dense as shipped over the fastest tried, 1M keys", _best_of_libraries, 0.98, 1.0),
    Target(
        "vertical-slash, pattern 1, 1M keys: share of matmul",
        _at("kernels", "vertical-slash 1M, pattern 1", "kernel_of_matmul"), 0.48, 0.60,
    ),
    Target("sparse with all costs over dense own, 1M keys: times", _sparse_gain, 7.0, 8.5),
    Target(
        "estimate, selection, recall, 1M keys: ms", _at("kernels", "estimate, selection, recall 1M", "ms"), 6.0, 4.0,
        False, _H200,
    ),
    Target("selection alone, 1M keys: ms", _part("selection"), 0.5, None, False, _H200),
    Target("staging int8, 1M keys: share of copy", _at("kernels", "staging 1M int8", "of_copy"), 0.70, None),
    Target(
        "experts, 32,768 tokens: share of matmul",
        _at("kernels", "experts as shipped, 32768 tokens", "of_matmul"), 0.50, 0.65,
    ),
    Target("prefill 1,000,000 sparse, int8 KV: s", _whole("1000000 sparse, int8 KV"), 140, 110, False, _H200),
    Target(
        "prefill 1,000,000 sparse: peak GB", _at("prefill", "1000000 sparse, int8 KV", "peak_bytes", 1e-9), 128, 121,
        False, _H200,
    ),
    Target("prefill 256K dense, int8 KV: s", _whole("256K dense, int8 KV"), 65, None, False, _H200),
    Target("prefill 256K sparse, int8 KV: s", _whole("256K sparse, int8 KV"), 32, None, False, _H200),
    Target("prefill 128K dense, bf16 KV: s", _whole("128K dense, bf16 KV"), 16.5, 14, False, _H200),
    Target("decode at 1M, int8 KV: times the reading", _at("decode", "1M, int8 KV", "times_least"), 1.5, 1.25, False),
    Target("decode at 4K, int8 KV: ms", _at("decode", "4K, int8 KV", "ms_a_token"), 3.0, 2.0, False, _H200),
)  # fmt: skip


def show(path: Path) -> Iterator[str]:
    """Yield the text of a file, line by line. Raises ValueError: there is nothing in it."""
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"--show: {path}: no lines: run the benchmark with --out {path} first")
    is_rehearsal = any(line.get("rehearsal") for line in lines)
    if is_rehearsal:
        yield "REHEARSAL on a CPU with interpreted kernels: nothing here was measured"
    found: dict[tuple[str, str], Line] = {}
    troubled: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line["stage"], line["case"]
        if line["state"] == "done":
            found[key] = line
            troubled.pop(key, None)
        elif line["state"] in ("failed", "part") and (key not in found or line["state"] == "failed"):
            troubled[key] = troubled.get(key, {}) | line
    yield from _where(lines)
    yield from _figures(found)
    yield from _not_done(troubled)
    card = str(found.get(("env", "card"), {}).get("name", ""))
    yield from _targets(found, card, is_rehearsal)


def _where(lines: Sequence[Line]) -> Iterator[str]:
    """Say on which card, and by which builds, in the order of calls."""
    told: set[str] = set()
    for line in lines:
        if (line["stage"], line["case"], line["state"]) == ("env", "card", "done"):
            smi = line.get("smi") or {}
            text = (
                f"{line.get('name', 'no GPU')}, driver {smi.get('driver_version')}, limit {smi.get('power.limit')}, "
                f"commit {line.get('commit')}, build {line.get('build')}, torch {line.get('torch')}, "
                f"Triton {line.get('packages', {}).get('triton')}, cuDNN {line.get('cudnn')}, {line['at']} UTC"
            )
            if text not in told:
                told.add(text)
                yield text
        if (line["stage"], line["case"], line["state"]) == ("env", "matmul", "done"):
            busy = line.get("smi_while_busy") or {}
            yield f"while busy: SM {busy.get('clocks.sm')}, memory {busy.get('clocks.mem')}, {busy.get('power.draw')}"
    builds = {line.get("build") for line in lines if line.get("build")}
    if len(builds) > 1:
        yield f"WARNING: these lines come from {len(builds)} different builds"


def _figures(found: Found) -> Iterator[str]:
    stage = ""
    for (name, case), line in found.items():
        if name != stage:
            stage = name
            yield f"\n{stage}"
        yield f"  {case:<52} {_text(line)}"
        if line.get("pattern"):
            yield f"  {'':<52} {line['pattern']}"
        for parts in ("parts_s", "parts_ms"):
            if line.get(parts):
                spent = ", ".join(f"{part} {_number(value)}" for part, value in line[parts].items())
                yield f"  {'':<52} {parts.removeprefix('parts_')}: {spent}"


def _not_done(troubled: Mapping[tuple[str, str], Line]) -> Iterator[str]:
    if troubled:
        yield "\nnot done"
    for (stage, case), line in troubled.items():
        reason = str(line.get("error", "cut")).strip().splitlines()[-1:]
        so_far = f"; until then {_text(line)}" if "seconds" in line else ""
        yield f"  {stage} {case}: {''.join(reason)[:300]}{so_far}"


def _targets(found: Found, card: str, is_rehearsal: bool) -> Iterator[str]:
    yield "\ntargets"
    for target in TARGETS:
        value = None if is_rehearsal else target.value(found)
        sign = ">=" if target.at_least else "<="
        wanted = f"{sign} {target.must:g}" + ("" if target.aim is None else f", aim {target.aim:g}")
        if value is None:
            verdict = "not measured"
        elif target.only_on and target.only_on not in card:
            verdict = f"{value:.4g} (the target is for an {target.only_on})"
        else:
            verdict = f"{value:.4g}  {_verdict(target, value)}"
        yield f"  {target.what:<58} {wanted:<20} {verdict}"


def _verdict(target: Target, value: float) -> str:
    def reaches(bound: float) -> bool:
        return value >= bound if target.at_least else value <= bound

    if target.aim is not None and reaches(target.aim):
        return "MET, aim too"
    return "MET" if reaches(target.must) else "MISSED"


def _text(line: Line) -> str:
    return ", ".join(f"{name} {_number(line[name])}" for name in _FIGURES if line.get(name) is not None)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
