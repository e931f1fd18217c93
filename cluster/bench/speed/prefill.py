"""Time to first token against length, and time of a decode step against context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.bench.speed.head import Layout, MeasuredHead, Served, attention_of
from cluster.bench.speed.run import Run
from cluster.bench.timeline.trace import TraceLog

_MAX_CHUNKS = 1024  # of a prompt that are kept in a result


def measure_prefill(run: Run) -> None:
    """Add a row for every mode, layout and length: seconds to the first token, and how the fitted steps compare."""
    settings = run.bench.settings
    run.total = len(settings.modes) * len(settings.layouts) * len(settings.lengths)
    for mode in settings.modes:
        for layout in (Layout(*pair) for pair in settings.layouts):
            with run.head(mode, layout, max(settings.lengths) + 2) as head:
                run.note_model(head)
                for length in settings.lengths:
                    _prefill_row(run, head, mode, layout, length)


def _prefill_row(run: Run, head: MeasuredHead, mode: str, layout: Layout, length: int) -> None:
    log = TraceLog(head.runtime.engine, head.deployment.shards)
    last: list[Served] = []

    def measure(number: int) -> Mapping[str, Any]:
        ids = head.prompt(length, run.seed(length, number))
        log.clear()
        last[:] = [head.serve(ids, 2)]
        seconds = last[0].first_token_s
        return {"first_token_s": seconds, "prefill_tokens_per_s": length / seconds}

    key = {"mode": mode, "stages": layout.stages, "shards": layout.shards, "length": length}
    run.row(key, measure, lambda: {**attention_of(last[0]), "chunks": _fitted(head, log), **head.memory(length)})
    log.close()


def _fitted(head: MeasuredHead, log: TraceLog) -> list[dict[str, Any]]:
    """Return the measured seconds of every chunk of the last repeat, beside those of the fitted latency model."""
    latency = head.runtime.engine.latency
    return [
        {"start": plan.slices[0].start, "length": plan.num_tokens, "measured_s": round(seconds, 5),
         "fitted_s": round(latency.predict(plan), 5)}
        for plan, seconds in log.chunks()[:_MAX_CHUNKS]
    ]  # fmt: skip


def measure_decode(run: Run) -> None:
    """Add a row for every mode, layout and context: milliseconds of a decode step after a prompt of that length."""
    settings = run.bench.settings
    run.total = len(settings.modes) * len(settings.layouts) * len(settings.lengths)
    for mode in settings.modes:
        for layout in (Layout(*pair) for pair in settings.layouts):
            with run.head(mode, layout, max(settings.lengths) + settings.tokens + 1) as head:
                run.note_model(head)
                for length in settings.lengths:
                    _decode_row(run, head, mode, layout, length)


def _decode_row(run: Run, head: MeasuredHead, mode: str, layout: Layout, length: int) -> None:
    tokens = run.bench.settings.tokens
    ids = head.prompt(length, run.seed(length))
    run.display.label("")
    run.display.status(f"{mode}, {layout}: reading {length:,} tokens")
    head.serve(ids, 2)  # its pages stay for the repeats

    def measure(number: int) -> Mapping[str, Any]:
        served = head.serve(ids, 1 + tokens)
        return {
            "decode_ms": served.decode_s * 1e3, "decode_tokens_per_s": 1 / served.decode_s,
            "cached_tokens": served.job.result.cached_tokens,
        }  # fmt: skip

    key = {"mode": mode, "stages": layout.stages, "shards": layout.shards, "length": length, "tokens": tokens}
    run.row(key, measure, lambda: head.memory(length + tokens))
