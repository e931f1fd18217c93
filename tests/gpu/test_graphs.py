"""Steps that decode as CUDA graphs on a GPU: the same as eager steps, and nothing is left half-captured."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from time import perf_counter

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, ModelSpec
from protos.stage.messages import StepPlan
from tests.support.decode_plans import ORDERS, DecodePlans
from tests.support.paths import NEEDLE
from workers.kv.paged import PagedKV
from workers.model.weights import ShardWeights, dummy_shard, load_shard, whole_model
from workers.runner.cuda_recorder import CudaRecorder
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.transport.collectives import Collectives

PAGE, PAGES = 4, 40
CHUNKS = DualChunkSpec(chunk_size=12, local_size=4, original_max_position_embeddings=8)
SPEC = load_model_spec(NEEDLE)


def runner(spec: ModelSpec, weights: ShardWeights, cache: torch.dtype) -> ModelRunner:
    kv = PagedKV(spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, PAGES, PAGE, cache, "cuda")
    return ModelRunner(spec, whole_model(spec), weights, kv, Collectives(), torch.device("cuda", 0))


def decode(one: ModelRunner, plans: list[StepPlan]) -> list[StepOutput]:
    return [one.execute(plan, keep_logits=True) for plan in plans]


def compare(mine: list[StepOutput], other: list[StepOutput], bound: float) -> None:
    for got, wanted in zip(mine, other, strict=True):
        assert (got.logits is None) == (wanted.logits is None)
        if got.logits is not None and wanted.logits is not None:
            wide = wanted.logits.cpu()
            assert (got.logits.cpu() - wide).abs().max() <= bound * wide.abs().max()


@pytest.mark.parametrize(("dtype", "cache", "bound"), [
    (torch.float32, torch.float32, 1e-4), (torch.bfloat16, torch.bfloat16, 3e-2), (torch.bfloat16, torch.int8, 5e-2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("chunks", [False, True])
def test_rows_that_join_and_leave(chunks: bool, dtype: torch.dtype, cache: torch.dtype, bound: float) -> None:
    pytest.importorskip("safetensors", reason="a checkpoint is read")
    torch.backends.cuda.matmul.allow_tf32 = False
    spec = replace(SPEC, dual_chunk=CHUNKS) if chunks else SPEC
    weights = load_shard(NEEDLE, spec, whole_model(spec), dtype, torch.device("cuda", 0))
    plans = DecodePlans(PAGE, PAGES, spec.vocab_size, prompt=7).make()
    captured, eager = runner(spec, weights, cache), runner(spec, weights, cache)
    captured.capture_decode(17)
    graphs = captured._graphs
    assert graphs is not None
    assert {graph.rows for graph in graphs.graphs} == {17, 16, 8, 4, 2, 1}
    replays: list[int] = []
    for graph, replay in list(graphs._replays.items()):

        def counted(replay: object = replay, rows: int = graph.rows) -> None:
            replays.append(rows)
            replay()  # type: ignore[operator]

        graphs._replays[graph] = counted
    for _ in range(2):  # graphs are used again after a reset
        mine, twin = decode(captured, plans), decode(eager, plans)
        compare(mine, twin, bound)
        if dtype == torch.float32:
            assert [out.tokens for out in mine] == [out.tokens for out in twin]
        captured.reset()
        eager.reset()
    assert len(replays) == 2 * len(ORDERS)


def test_results_do_not_depend_on_the_graphs_that_ran_between() -> None:
    weights = dummy_shard(SPEC, whole_model(SPEC), torch.bfloat16, torch.device("cuda", 0))
    captured = runner(SPEC, weights, torch.bfloat16)
    captured.capture_decode(17)
    plans = DecodePlans(PAGE, PAGES, SPEC.vocab_size).make()
    first = decode(captured, plans)
    captured.reset()
    noise = torch.full((1 << 26,), torch.nan, device="cuda")  # what other memory holds does not matter either
    del noise
    for mine, other in zip(decode(captured, plans), first, strict=True):
        if mine.logits is not None and other.logits is not None:
            assert torch.equal(mine.logits, other.logits)


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    device = torch.device("cuda", 0)
    before, x = torch.cuda.current_stream(device), torch.ones(16, device=device)
    with pytest.raises(RuntimeError):
        CudaRecorder(device).capture(lambda: float(x.sum()))
    assert torch.cuda.current_stream(device) == before
    assert float((x + 1).sum()) == 32
    out = torch.zeros(16, device=device)
    replay = CudaRecorder(device).capture(lambda: torch.add(x, 1, out=out))  # type: ignore[arg-type, return-value]
    x.fill_(5)
    replay()
    assert out.tolist() == [6] * 16


def test_a_replay_takes_less_time_than_its_launches(capsys: pytest.CaptureFixture[str]) -> None:
    """Print milliseconds of a step of one row, eager and as a graph."""
    weights = dummy_shard(SPEC, whole_model(SPEC), torch.bfloat16, torch.device("cuda", 0))
    times = []
    for capacity in (0, 1):
        one = runner(SPEC, weights, torch.bfloat16)
        if capacity:
            one.capture_decode(capacity)
        steps = []
        for _ in range(20):
            one.reset()
            plan = DecodePlans(PAGE, PAGES, SPEC.vocab_size).make()[0]
            began = perf_counter()
            one.execute(plan)
            steps.append(perf_counter() - began)
        times.append(1e3 * median(steps))
    with capsys.disabled():
        print(f"\nneedle, one row: eager {times[0]:.2f} ms, graph {times[1]:.2f} ms")
    assert times[1] < times[0]
