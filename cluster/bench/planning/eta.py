"""The predicted end of a prefill against the truth, at every tenth of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.bench.planning.watch import OtherLoad
from cluster.bench.rig import random_ids, running_head, serve
from cluster.client.models import ProgressEvent, TokenEvent
from protos.node.environment import usable_cores

_DISTURBED = 0.2  # cores that others keep busy
_ALLOWED = 0.15  # of the truth, at a tenth
_TENTHS = tuple(number / 10 for number in range(1, 10))


def check_eta(
    model: Path, length: int, chunk: int, sparse: dict[str, object], before: int, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Return for every tenth of a prompt the seconds that were predicted and that it really took to the first token.

    Args:
        before: tokens of a prompt that the head reads first, and all that it knows: of 512 almost nothing follows.
    """
    head = running_head(
        model, chunk, usable_cores(), kv_bytes="64GiB", max_num_seqs=1, max_model_len=str(length + 64), sparse=sparse
    )
    with head as (client, runtime):
        vocab = runtime.deployment.spec.vocab_size
        serve(client, before, 2, 0, vocab)
        load = OtherLoad(runtime.launched.pids)
        job = client.submit(token_ids=random_ids(length, 1, vocab), max_tokens=1, ignore_eos=True)
        seen: list[tuple[float, float, float | None]] = []  # when, share computed, predicted seconds
        first = 0.0
        for event in job.stream():
            now = time.perf_counter()
            if isinstance(event, ProgressEvent):
                at = event.progress
                seen.append((now, at.processed / at.total, None if at.eta_ms is None else at.eta_ms / 1000))
                say(f"{at.processed:,} of {at.total:,} tokens, {(at.eta_ms or 0) / 1000:.1f} s left")
            elif isinstance(event, TokenEvent) and not first:
                first = now
        others = load.cores()
    rows = rows_of(seen, first)
    met = bool(rows) and abs(rows[0]["error"]) <= _ALLOWED
    return {
        "length": length, "chunk": chunk, "before": before, "prefill_s": round(first - seen[0][0], 3),
        "rows": rows, "met": met,
        "other_load_cores": others, "disturbed": others > _DISTURBED,
    }  # fmt: skip


def rows_of(seen: list[tuple[float, float, float | None]], first: float) -> list[dict[str, float]]:
    """Return a row for each tenth, of the first report at or after it: predicted and true seconds that are left."""
    rows = []
    for tenth in _TENTHS:
        at = next(((now, share, eta) for now, share, eta in seen if share >= tenth and eta is not None), None)
        if at is not None and first > at[0]:
            now, share, eta = at
            left = first - now
            assert eta is not None
            rows.append(
                {"share": round(share, 4), "predicted_s": eta, "true_s": left, "error": round(eta / left - 1, 4)}
            )
    return rows
