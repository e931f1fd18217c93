"""Our engine beside others, in turns, on the same checkpoint, prompts and threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from cluster.bench.peers.engines import Peer, Prompt, opened_peer
from cluster.bench.speed.head import Layout, attention_of, load_measured
from cluster.bench.speed.machine import LoadOfOthers
from cluster.bench.speed.repeats import figure, summarise
from cluster.bench.speed.run import Run

OURS = "longreach"
_VOCABULARY = 32000


def measure_compare(run: Run) -> None:
    """Add a row for every length and engine: seconds to the first token, milliseconds of a decode step.

    Ours and those of Python packages start afresh for every run; servers stay, and get prompts that are new to them.
    """
    settings = run.bench.settings
    layout = Layout(*settings.layouts[0])
    longest = max(settings.lengths) + settings.tokens + 1
    modes = list(settings.modes)
    first = load_measured(run.bench, modes[0], layout, longest, {"model.max_model_len": longest})
    threads = first.config.cluster.threads(run.report["machine"]["cores"]) * layout.processes
    run.report["threads"] = threads
    run.total = len(settings.lengths) * (len(modes) + len(settings.peers))
    with ExitStack() as steps:
        peers = {
            name: steps.enter_context(opened_peer(name, section, first.config.model.path, threads, longest))
            for name, section in settings.peers.items()
        }
        load = _load_with(run, peers)
        for length in settings.lengths:
            prompt = partial(_prompt, run, length, min(_VOCABULARY, first.spec.vocab_size))
            _compare(run, layout, load, peers, length, prompt)


def _prompt(run: Run, length: int, vocab_size: int, number: int) -> Prompt:
    return Prompt(length, run.seed(length, number), vocab_size, run.bench.settings.tokens)


def _load_with(run: Run, peers: Mapping[str, Peer]) -> LoadOfOthers:
    """Return what tells the load of others, with the servers of peers as our own."""
    assert run.load is not None
    return LoadOfOthers(run.load.cores, tuple(pid for peer in peers.values() for pid in peer.pids))


def _compare(
    run: Run, layout: Layout, load: LoadOfOthers, peers: Mapping[str, Peer], length: int,
    prompt: Callable[[int], Prompt],
) -> None:  # fmt: skip
    """Measure all engines on prompts of one length, in turns, and add a row for each."""
    settings = run.bench.settings

    def ours(mode: str, number: int) -> dict[str, Any]:
        asked = prompt(number)
        with run.head(mode, layout, length + settings.tokens + 1) as head:
            run.note_model(head)
            run.display.status(f"{mode}: {length:,} tokens")
            mark = load.mark()
            served = head.serve(asked.ids, 1 + settings.tokens)
            others = load.since(mark)  # here: once they have ended, our stages cannot be told from other programs
        figures = {"first_token_s": served.first_token_s, "decode_ms": served.decode_s * 1e3, "others": others}
        return figures | attention_of(served)

    def theirs(name: str, number: int) -> dict[str, Any]:
        run.display.label("")
        run.display.status(f"{name}: {length:,} tokens")
        return peers[name].measure(prompt(number))

    engines: dict[tuple[str, str], Callable[[int], dict[str, Any]]] = {}
    for mode in settings.modes:
        engines[OURS, mode] = partial(ours, mode)
    for name in peers:
        engines[name, ""] = partial(theirs, name)
    runs = run.repeats.run_in_turns(engines, load)
    rows = []
    for (engine, mode), done in runs.items():
        for one in done:
            one["prefill_tokens_per_s"] = length / one["first_token_s"]
        more: dict[str, Any] = {
            name: done[-1][name] for name in ("version", "density", "estimate_share") if name in done[-1]
        }
        rows.append({"engine": engine, "mode": mode, "stages": layout.stages if engine == OURS else 1,
                     "shards": layout.shards if engine == OURS else 1, "length": length, "tokens": settings.tokens,
                     **more, **summarise(done)})  # fmt: skip
    add_ratios(rows)
    for row in rows:
        run.add(row)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to every row how its times compare with those of our first mode at the same length: above 1 is slower."""
    ours = next(row for row in rows if row["engine"] == OURS)
    for row in rows:
        for name, key in (("first_token_s", "ratio_first_token"), ("decode_ms", "ratio_decode")):
            own, base = figure(row, name), figure(ours, name)
            if row is not ours and own and base:
                row[key] = round(own / base, 3)
