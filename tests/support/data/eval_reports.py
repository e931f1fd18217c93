"""Reports of evaluations as their result files hold them."""

from __future__ import annotations

from typing import Any

from cluster.engine.outputs import Generation, Timings
from cluster.scheduler.request import FinishReason

MODES = ("plain", "yarn", "dca", "sparse")


def generation(text: str, prompt: int = 100, cached: int = 0, **more: Any) -> Generation:
    """An answer with round timings: 2 s of prefill."""
    timings = Timings(0.0, 2.0, 0.5, 0.1, 2.6)
    return Generation((1,), text, None, FinishReason.STOP, (), prompt, cached, timings, **more)


def needle_report(lengths: list[int], modes: tuple[str, ...] = MODES, needles: int = 8) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for mode in modes:
        for length in lengths:
            outcomes = [{"right": mode != "plain" or index > 2, "depth": index / needles} for index in range(needles)]
            cells.append({
                "mode": mode, "length": length, "trial": 0, "total": needles, "outcomes": outcomes,
                "right": sum(outcome["right"] for outcome in outcomes), "ttft_s": 1.25, "prefill_tokens_per_s": 5000.0,
            })  # fmt: skip
            if mode == "sparse":
                cells[-1]["attention"] = {"density": 0.2, "held_out_recall": 0.97}
    return {
        "what": "needle", "model": "some-model", "form": "answer", "shared_words": True, "needles": needles,
        "trials": 1, "lengths": lengths, "modes": {mode: {} for mode in modes}, "complete": True, "cells": cells,
    }  # fmt: skip


def recall_report(layers: int, heads: int) -> dict[str, Any]:
    share = [[(layer + head) / (layers + heads) for head in range(heads)] for layer in range(layers)]
    names = ("density", "estimated_recall", "held_out_recall", "held_out_recall_min", "dense_share")
    variant = {
        "name": "sparse", "same_top1": 63, "logit_error_max": 0.0125, "kl_mean": 0.00031, "prefill_s": 3.0,
        "heads": dict.fromkeys(names, share),
    }  # fmt: skip
    int8 = {key: value for key, value in variant.items() if key != "heads"} | {"name": "int8 KV"}
    return {
        "what": "recall", "model": "some-model", "text": "book", "tokens": 65536, "next": 64,
        "reference": {"prefill_s": 9.0}, "variants": [variant, int8],
    }  # fmt: skip


def pinned_report() -> dict[str, Any]:
    entry = {"same_top1": 63, "logit_error_max": 0.02, "logit_error_mean": 0.01, "kl_mean": 0.0004}
    pinned = [
        {"scale_len": length, "logit_factor": 1.0 + length / 1e6, "sparse": sparse} | entry
        for length in (68_813, 131_072) for sparse in (False, True)
    ]  # fmt: skip
    return recall_report(2, 2) | {"pinned": pinned}


def ruler_report(
    lengths: list[int], tasks: tuple[str, ...] = ("vt", "cwe"), modes: tuple[str, ...] = MODES
) -> dict[str, Any]:
    """Four samples a cell: plain gets none right beyond the first length, sparse three, the others all."""
    cells: list[dict[str, Any]] = []
    for mode in modes:
        for length in lengths:
            lost = 4 if mode == "plain" and length > lengths[0] else 1 if mode == "sparse" else 0
            scores = [0.0] * lost + [1.0] * (4 - lost)
            for task in tasks:
                outcomes = [{"outputs": ["x"], "answer": "x", "score": score} for score in scores]
                cells.append({
                    "mode": mode, "task": task, "length": length, "score": sum(scores) / 4, "interval": [0.1, 0.9],
                    "samples": 4, "outcomes": outcomes,
                })  # fmt: skip
    return {
        "what": "ruler", "model": "some-model", "tasks": list(tasks), "samples": 4, "lengths": lengths,
        "modes": {mode: {} for mode in modes}, "complete": True, "cells": cells,
    }  # fmt: skip
