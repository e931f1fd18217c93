"""Stages `prefill` and `decode`: the whole model, step by step, with the time by part, memory and launches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import SequenceSlice, StepPlan
from workers.bench.gpu.context import Case, Context, Sizes
from workers.bench.gpu.journal import Line
from workers.bench.gpu.parts import STEP, Recorder, count_launches
from workers.bench.gpu.patterns import patterns, stated
from workers.bench.gpu.rates.attention import name_of
from workers.bench.gpu.whole.model import (
    attention_spec,
    capture_graphs,
    decode_bytes,
    on_interpreted_kernels,
    prompt,
    runner_of,
    weights_of,
)
from workers.eval.whole_model import SequenceFeed
from workers.runner.model_runner import ModelRunner

_DECODED = 24  # steps that are timed, after as many
_INT8 = torch.int8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to prefill, in steps of `Sizes.step` tokens; `last_step` alone, over random KV."""

    length: int
    sparse: bool
    cache: torch.dtype | None  # None: as the model
    chunks: bool = False
    last_step: bool = False

    @property
    def name(self) -> str:
        """Return the name of the case."""
        kind = "sparse" if self.sparse else "dense"
        cache = "int8" if self.cache == _INT8 else "bf16"
        only = ", the last step alone" if self.last_step else ""
        return f"{name_of(self.length)} {kind}, {cache} KV{only}"


def prompts(context: Context) -> Iterator[tuple[Prompt, float]]:
    """Yield prompts and the seconds that are needed to begin one: about what the slowest target allows."""
    if context.rehearsal:
        for sparse in (False, True):
            yield Prompt(100 if sparse else 40, sparse, _INT8, chunks=sparse), 1
        yield Prompt(60, False, _INT8, last_step=True), 1
        return
    yield Prompt(1 << 17, False, None), 40
    yield Prompt(1 << 17, False, _INT8), 40
    yield Prompt(1 << 17, True, _INT8), 40
    yield Prompt(1 << 18, False, _INT8), 100
    yield Prompt(1 << 18, True, _INT8), 70
    yield Prompt(1_000_000, True, _INT8, chunks=True), 200
    yield Prompt(1_000_000, False, _INT8, chunks=True, last_step=True), 90


def prefill_cases(context: Context) -> Iterator[Case]:
    """Yield the cases of stage `prefill`."""
    yield Case("prefill", "weights", _weights, 15, 120)
    yield Case("prefill", "launches of a step", _prefill_launches, 30, 180)
    for one, needs in prompts(context):
        yield Case("prefill", one.name, partial(_prefill, one), needs, 500)


def decode_cases(context: Context) -> Iterator[Case]:
    """Yield the cases of stage `decode`."""
    yield Case("decode", "launches of a step", _decode_launches, 20, 120)
    lengths = (50,) if context.rehearsal else (4096, 1 << 17, 1 << 20)
    for keys in lengths:
        for cache in (_INT8, None):
            if cache is None and keys == 1 << 20:
                continue  # 98 GB beside 61 GB of weights
            name = f"{name_of(keys)}, {'int8' if cache else 'bf16'} KV"
            yield Case("decode", name, partial(_decode, keys, cache), 30, 200)


def _weights(context: Context) -> Line:
    weights = weights_of(context)
    context.synchronize()
    return {"bytes": weights.num_bytes, "what": "random weights, made on the device"}


def _prefill(one: Prompt, context: Context) -> Iterator[Line]:
    """Yield after every step what was measured so far; `seconds` are those of all steps so far."""
    spec = attention_spec(context, one.sparse, one.chunks)
    pattern, step = patterns(context.sizes)[0], _step_of(context, one.sparse)
    begin = (one.length - 1) // step * step if one.last_step else 0
    with ExitStack() as stack:
        stack.enter_context(on_interpreted_kernels(context))
        if one.sparse:
            drawing = stack.enter_context(stated(pattern, context.device))
        runner = runner_of(context, spec, one.length, one.cache, filled=one.last_step)
        ids = prompt(spec, one.length)
        if not context.rehearsal:
            warm_up(context.sizes, runner, ids, step, one)
            context.synchronize()
        feed = SequenceFeed(runner, context.sizes.page, one.length)
        if begin:
            feed.skip(ids[:begin])
        recorder = Recorder(context.device)
        stack.enter_context(recorder.recording(STEP))
        _reset_peak(context)
        spent: list[float] = []
        parts: dict[str, float] = {}
        for start in range(begin, one.length, step):
            stop = min(start + step, one.length)
            context.synchronize()
            if one.sparse:
                drawing.seconds()
            began = time.perf_counter()
            feed.take(ids[start:stop], sample=stop == one.length)
            context.synchronize()
            spent.append(time.perf_counter() - began)
            for part, seconds in recorder.seconds().items():
                parts[part] = parts.get(part, 0.0) + seconds
            if one.sparse:
                drawn = drawing.seconds().get("drawing", 0.0)
                spent[-1] -= drawn
                parts["selection"] = parts.get("selection", 0.0) - drawn
            yield _so_far(context, one, spec, stop, spent, parts) | {
                "pattern": pattern.name if one.sparse else None, "missing": recorder.missing, "step": step,
                "density": _density(feed) if one.sparse else None,
            }  # fmt: skip


def _step_of(context: Context, sparse: bool) -> int:
    """Return the tokens of a step: whole cells of sparse prefill."""
    return 2 * context.sizes.cell if context.rehearsal and sparse else context.sizes.step


def _so_far(
    context: Context, one: Prompt, spec: ModelSpec, stop: int, spent: list[float], parts: dict[str, float]
) -> Line:
    total = sum(spent)
    named = {**parts, "rest": total - sum(parts.values())}
    found: Line = {
        "tokens": stop, "of": one.length, "layers": spec.num_hidden_layers, "dual_chunk": one.chunks,
        "is_whole": stop == one.length and not one.last_step, "peak_bytes": _peak(context),
        "seconds": total, "tokens_s": (stop if not one.last_step else 0) / total or None,
        "step_s": [round(each, 4) for each in spent], "parts_s": {name: round(each, 4) for name, each in named.items()},
    }  # fmt: skip
    if context.rehearsal:  # nothing that looks like a measurement
        found |= {"seconds": None, "tokens_s": None, "step_s": None, "parts_s": dict.fromkeys(named)}
    return found


def warm_up(sizes: Sizes, runner: ModelRunner, ids: list[int], step: int, one: Prompt) -> None:
    """Compute steps, so that kernels are compiled and memory is taken; the next feed forgets them.

    Rows behind two DCA chunks take other builds of kernels. What is in the pages before them does not matter.
    """
    feed = SequenceFeed(runner, sizes.page, one.length)
    for start in (0, step):
        feed.take(ids[start : start + step], sample=False)
    if not one.chunks:
        return
    runner.reset()
    start = (one.length - 1) // step * step
    stop = one.length if one.last_step else start + sizes.cell
    pages = range(-(-stop // sizes.page))
    part = SequenceSlice(0, start, stop - start, one.length, ids[start:stop], pages, len(pages), None)
    runner.execute(StepPlan(0, (part,)))


def _density(feed: SequenceFeed) -> float | None:
    """Return the mean share of visited pairs in those of causal attention, over cells, layers and heads."""
    visited = causal = 0.0
    for report in feed.cells:
        pairs = report.length * (report.start + 1) + report.length * (report.length - 1) // 2
        visited += pairs * sum(report.density)
        causal += pairs * len(report.density)
    return visited / causal if causal else None


def _prefill_launches(context: Context) -> Line:
    """Count the kernels of the second step of a prompt: dense and sparse."""
    found: Line = {}
    for sparse in (True,) if context.rehearsal else (False, True):
        spec, step = attention_spec(context, sparse, False), _step_of(context, sparse)
        with ExitStack() as stack:
            stack.enter_context(on_interpreted_kernels(context))
            if sparse:
                stack.enter_context(stated(patterns(context.sizes)[0], context.device))
            first = 0 if context.rehearsal else step
            runner = runner_of(context, spec, first + step, _INT8)
            ids = prompt(spec, first + step)
            feed = SequenceFeed(runner, context.sizes.page, first + step)
            if first:
                feed.take(ids[:first], sample=False)
            launches = count_launches(partial(feed.take, ids[first:]), context.device)
        name = "sparse" if sparse else "dense"
        found[name] = launches
        found[f"{name}_a_layer"] = None if launches is None else launches / spec.num_hidden_layers
        del runner, feed
    return found | {"what": "kernels and copies of a step; a pattern that is drawn counts in sparse"}


def _decode(keys: int, cache: torch.dtype | None, context: Context) -> Line:
    """Time decode steps of one sequence over random KV, as graphs; the parts are those of an eager step before."""
    spec = attention_spec(context, False, False)
    steps = 2 if context.rehearsal else _DECODED
    with on_interpreted_kernels(context):
        runner = runner_of(context, spec, keys + 2 * steps + 2, cache, filled=True)
        feed = SequenceFeed(runner, context.sizes.page, keys)
        feed.skip([7] * keys)
        spent: list[float] = []
        _reset_peak(context)
        feed.take([7])
        recorder = Recorder(context.device)
        with recorder.recording(STEP):
            feed.take(feed.tokens[-1:])
        parts = {name: None if context.rehearsal else each * 1e3 for name, each in recorder.seconds().items()}
        are_graphs = capture_graphs(context, runner)
        token = feed.tokens[-1]
        for _ in range(2 * steps):
            context.synchronize()
            began = time.perf_counter()
            feed.take([token])
            context.synchronize()
            spent.append(time.perf_counter() - began)
            token = feed.tokens[-1]
    needed = decode_bytes(spec, keys, cache or context.dtype)
    found = context.rates(spent[steps:], moved=float(needed))
    floor = context.ceiling("copy", "gbs")
    least = None if not floor else needed / floor / 1e6  # at the rate of a copy
    times = None if not least or found["ms"] is None else found["ms"] / least
    return found | {
        "ms_a_token": found["ms"], "bytes": needed, "least_ms": least, "times_least": times, "parts_ms": parts,
        "keys": keys, "graphs": are_graphs, "peak_bytes": _peak(context), "missing": recorder.missing,
    }  # fmt: skip


def _decode_launches(context: Context) -> Line:
    spec, keys = attention_spec(context, False, False), min(4096, context.sizes.long)
    with on_interpreted_kernels(context):
        runner = runner_of(context, spec, keys + 8, _INT8, filled=True)
        feed = SequenceFeed(runner, context.sizes.page, keys)
        feed.skip([7] * keys)
        feed.take([7])
        launches = count_launches(partial(feed.take, [7]), context.device)
    return {"launches": launches, "a_layer": None if launches is None else launches / spec.num_hidden_layers}


def _reset_peak(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)


def _peak(context: Context) -> int | None:
    """Return the most bytes in use of the card since `_reset_peak`: what torch holds, and what others do now."""
    if context.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(context.device)
    others = total - free - torch.cuda.memory_reserved(context.device)
    return torch.cuda.max_memory_reserved(context.device) + others
