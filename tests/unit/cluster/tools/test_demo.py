"""The demonstration without a cluster: its deployment at every length, the report, and the memory of processes."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from cluster.engine.attention_report import AttentionSummary
from cluster.engine.outputs import Generation, Timings
from cluster.scheduler.request import FinishReason
from cluster.tools.demo import DemoOptions, MemoryWatch, demo_deployment, demo_report, tree_pss_bytes
from cluster.tools.eval.haystack import Haystack, Needle
from protos.errors import UserError

MIB = 1 << 20
LENGTHS = [1000, 4096, 128_000, 1 << 20]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("positions", ["dca", "yarn", "plain"])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_deployment_holds_the_document(tokens: int, positions: str, sparse: bool) -> None:
    deployment = demo_deployment(DemoOptions(tokens, positions=positions, sparse=sparse))
    assert deployment.max_model_len == tokens + 256
    assert (deployment.spec.dual_chunk is not None) == (positions == "dca")
    assert (deployment.spec.sparse is not None) == sparse
    assert deployment.spec.rope.kind == ("yarn" if positions == "yarn" else "default")
    kv_bytes = deployment.config.kv_cache.bytes
    assert kv_bytes is not None
    assert kv_bytes >= 512 * (tokens + 256)
    parallel = deployment.config.cluster
    assert (parallel.pipeline_parallel_size, parallel.expert_parallel_size) == (2, 2)


@pytest.mark.parametrize("tokens", [0, 999, (1 << 20) + 1])
def test_lengths_out_of_range(tokens: int) -> None:
    with pytest.raises(UserError, match=f"^tokens: {tokens}: must be between 1000 and 1048576$"):
        demo_deployment(DemoOptions(tokens))


def answer(text: str, ttft_s: float, **more: Any) -> Generation:
    timings = Timings(0.0, 2.0, ttft_s, 0.5, ttft_s + 0.5)
    return Generation(tuple(range(16)), text, None, FinishReason.STOP, (), 8000, 0, timings, **more)


def test_report() -> None:
    needles = [
        Needle("dark", "river", code, "?", f" The secret code of dark river is {code}.", 0.5)
        for code in ("12345", "54321")
    ]
    summary = AttentionSummary("sparse", "default", 1000, cells=2, density=0.25, held_out_recall=0.97)
    answers = (answer(" The secret code of dark river is 12345.", 2.0, attention=summary), answer("no", 3.0))
    haystack = Haystack("text", tuple(needles), 7990)
    report = demo_report(DemoOptions(8000), haystack, answers, (2, 2), 4.0, 9.0, 1 << 30)
    assert (report["right"], report["total"], report["tokens"], report["positions"]) == (1, 2, 7990, "dca")
    assert [row["right"] for row in report["questions"]] == [True, False]
    assert report["questions"][0]["truth"] == report["questions"][0]["answer"]
    assert report["sparse"]["density"] == 0.25
    assert (report["ttft_s"], report["prefill_tokens_per_s"], report["decode_tokens_per_s"]) == (2.0, 4000.0, 20.0)
    assert report["http"] is None
    assert (report["stages"], report["shards_per_stage"], report["peak_memory_bytes"]) == (2, 2, 1 << 30)


def test_memory_of_a_child_counts_and_the_peak_stays() -> None:
    before = tree_pss_bytes()
    assert before > 5 * MIB
    with MemoryWatch(every_s=0.05) as watch:
        code = "data = bytearray(b'x') * (64 << 20); print('up', flush=True); input()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        deadline = time.monotonic() + 20
        while watch.peak_bytes < before + 60 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
        child.communicate("\n")
    assert before + 60 * MIB < watch.peak_bytes < before + 200 * MIB
    assert tree_pss_bytes() < before + 60 * MIB
