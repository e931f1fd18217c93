"""Steps that decode as graphs, replayed from static memory: the same as eager steps, and as steps on a CPU."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.quant.scheme import QuantScheme
from protos.model.spec import DualChunkSpec, ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan
from tests.support.decode_plans import ORDERS, DecodePlans
from tests.support.paths import NEEDLE
from tests.support.replayed import ReplayedOnCPU
from workers.attention import compiled as compiled_attention
from workers.bench.model import benchmark_spec
from workers.kernels.triton.layer import calls
from workers.kernels.triton.quant import calls as quantised
from workers.kv.paged import PagedKV
from workers.model.weights import ShardWeights, dummy_shard, load_shard, whole_model
from workers.quant.weight import QuantizedWeight
from workers.runner import decode_graphs
from workers.runner.decode_graphs import Graph, row_counts
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.transport.collectives import Collectives

PAGE, CPU, PAGES = 4, torch.device("cpu"), 40
PLAIN = replace(
    benchmark_spec(layers=1), vocab_size=97, hidden_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
CHUNKS = DualChunkSpec(chunk_size=12, local_size=4, original_max_position_embeddings=8)
DENSE = replace(PLAIN, num_experts=0, intermediate_size=64, qk_norm=False, dual_chunk=CHUNKS)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels of GPUs run, in the interpreter."""
    monkeypatch.setattr(calls, "supports", lambda device: True)
    monkeypatch.setattr(compiled_attention, "supports", lambda q, kv: False)


def runner(
    spec: ModelSpec, cache: torch.dtype = torch.float32, shard: ShardSpec | None = None,
    weights: ShardWeights | None = None,
) -> ModelRunner:  # fmt: skip
    """Make a runner whose cache holds nothing that a row may see before it was written."""
    shard = shard or whole_model(spec)
    kv = PagedKV(shard.layers.size, spec.num_key_value_heads, spec.head_dim, PAGES, PAGE, cache)
    for side in (kv._data, kv._scales):
        if side is not None and side.is_floating_point():
            side.fill_(math.nan)
        elif side is not None:
            side.zero_()
    return ModelRunner(spec, shard, weights or dummy_shard(spec, shard, torch.float32, CPU), kv, Collectives(), CPU)


def decode(one: ModelRunner, plans: list[StepPlan]) -> list[StepOutput]:
    return [one.execute(plan, keep_logits=True) for plan in plans]


def compare(mine: list[StepOutput], other: list[StepOutput], bound: float) -> None:
    assert [out.tokens for out in mine] == [out.tokens for out in other]
    for got, wanted in zip(mine, other, strict=True):
        if wanted.logits is None:
            assert got.logits is None
            continue
        assert got.logits is not None
        assert (got.logits - wanted.logits).abs().max() <= bound * wanted.logits.abs().max()


def memory_of(one: ModelRunner) -> set[int]:
    """Return the addresses of all that graphs may read: weights, cache, page tables, inputs and outputs."""
    decoder, graphs = one.decoder, one._graphs
    assert graphs is not None
    weights = decoder._weights
    named = [getattr(layer, each.name) for layer in weights.layers for each in fields(layer)]
    tensors = [part for one in named for part in (one.parts.values() if isinstance(one, QuantizedWeight) else (one,))]
    tensors += [weights.embed, weights.norm, weights.lm_head, *decoder._head_norms, decoder._rotary._inv_freq]
    tensors += [one._kv._data, one._kv._scales, one._device_tables.slots, graphs._inputs._there, graphs._hidden]
    tensors += [graphs._outputs.hidden, graphs._outputs.logits, graphs._outputs.chosen]
    return {each.untyped_storage().data_ptr() for each in tensors if each is not None}


@pytest.mark.parametrize(("spec", "cache", "capacity", "bound"), [
    (DENSE, torch.float32, 17, 1e-4), (PLAIN, torch.float32, 5, 1e-4), (PLAIN, torch.int8, 5, 2e-2),
], ids=["chunks", "experts", "experts-int8"])  # fmt: skip
def test_rows_that_join_and_leave(
    spec: ModelSpec, cache: torch.dtype, capacity: int, bound: float, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit codes may differ by one step from those of a CPU where the values before them differ in their last bits."""
    orders = [order for order in ORDERS if len(order) <= capacity]
    plans = DecodePlans(PAGE, PAGES, 97, orders=orders).make()
    wanted = [Graph(rows, 1) for rows in row_counts(capacity)]
    if spec is DENSE:  # graphs for few and for many keys
        for name, value in (("_BLOCK", 16), ("_MIN_BLOCKS", 1)):
            monkeypatch.setattr(f"workers.kernels.triton.layer.decode.{name}", value)
        monkeypatch.setattr(decode_graphs, "_FEW_KEYS", 8)
        monkeypatch.setattr(decode_graphs, "processors", lambda device: 8)
        wanted += [Graph(17, 2), Graph(16, 2), Graph(8, 3), Graph(4, 6), Graph(2, 10), Graph(1, 10)]
    recorder, graphs, eager = ReplayedOnCPU(), runner(spec, cache), runner(spec, cache)
    graphs.capture_decode(capacity, recorder)
    assert graphs._graphs is not None
    assert sorted(graphs._graphs.graphs) == sorted(wanted)
    for recording in recorder.recordings:
        assert recording.kernels >= 9
        assert set(recording.read) <= memory_of(graphs)
    assert graphs._kv._data.float().isnan().all() or cache == torch.int8, "a capture writes no KV"
    mine, twin = decode(graphs, plans), decode(eager, plans)
    assert recorder.replays == len(plans)
    compare(mine, twin, 1e-5)
    written = [one._kv._data.float() for one in (graphs, eager)]
    torch.testing.assert_close(*written, rtol=1e-4, atol=1 if cache == torch.int8 else 1e-5, equal_nan=True)
    assert graphs.decoder.layers_done >= eager.decoder.layers_done == len(plans)
    monkeypatch.setattr(calls, "supports", lambda device: False)
    compare(mine, decode(runner(spec, cache), plans), bound)


@pytest.mark.parametrize(("scheme", "capability"), [
    (QuantScheme("awq", 4, group=16, has_zeros=True), (8, 0)),
    (QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128), (8, 0)),
    (QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128), (9, 0)),
], ids=["int4", "fp8", "fp8-scaled"])  # fmt: skip
def test_quantised_experts(
    scheme: QuantScheme, capability: tuple[int, int], kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products never wait for the host; where weights are dequantised instead, the host sorts rows."""
    spec = replace(PLAIN, quant=scheme)
    assert not runner(spec).capture_decode(2, ReplayedOnCPU())
    monkeypatch.setattr(quantised, "_TYPES", (torch.float32,))
    monkeypatch.setattr(quantised, "capability", lambda device: capability)
    plans = DecodePlans(PAGE, PAGES, 97, orders=[order for order in ORDERS if len(order) <= 3][:6]).make()
    recorder, graphs = ReplayedOnCPU(), runner(spec)
    assert isinstance(graphs.decoder._weights.layers[0].experts_down, QuantizedWeight)
    assert graphs.capture_decode(3, recorder)
    for recording in recorder.recordings:
        assert set(recording.read) <= memory_of(graphs)
    mine = decode(graphs, plans)
    compare(mine, decode(runner(spec), plans), 1e-5)
    assert recorder.replays == len(plans)
    monkeypatch.setattr(quantised, "supports", lambda x, *weights: False)
    assert not runner(spec).capture_decode(2, ReplayedOnCPU())
    if capability < (8, 9):  # whose activations are not rounded
        compare(mine, decode(runner(spec), plans), 1e-4)


def test_the_needle_checkpoint(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that an eager step reads, then rows that join it."""
    spec = load_model_spec(NEEDLE)
    weights = load_shard(NEEDLE, spec, whole_model(spec), torch.float32, CPU)
    orders = [*ORDERS[:6], (2, 9, 17), (9,)]
    plans = DecodePlans(PAGE, PAGES, spec.vocab_size, prompt=7, orders=orders).make()
    recorder, graphs = ReplayedOnCPU(), runner(spec, weights=weights)
    graphs.capture_decode(5, recorder)
    mine = decode(graphs, plans)
    assert recorder.replays == len(orders) == len(plans) - 1
    compare(mine, decode(runner(spec, weights=weights), plans), 1e-5)
    monkeypatch.setattr(calls, "supports", lambda device: False)
    compare(mine, decode(runner(spec, weights=weights), plans), 1e-4)


def test_two_stages_and_tokens_that_come_back(kernels: None) -> None:
    """Every stage has graphs of its own; a plan without ids continues with what was sampled last."""

    def stages(capacity: int) -> list[ModelRunner]:
        made = []
        for stage in range(2):
            spec = replace(PLAIN, num_hidden_layers=2)
            shard = replace(whole_model(spec), stage=stage, num_stages=2, layers=Span(stage, stage + 1))
            made.append(runner(spec, shard=shard))
            if capacity:
                made[-1].capture_decode(capacity, ReplayedOnCPU())
        return made

    found = []
    for first, last in (stages(3), stages(0)):
        assert (first._graphs is None) == (last._graphs is None)
        tokens: list[tuple[int, ...]] = []
        for start in range(6):
            parts = tuple(
                SequenceSlice(
                    sequence, start, 1, 3, () if start else (sequence,), [sequence + start] if start % PAGE == 0
                    else [], start // PAGE + 1, SampleSpec(SamplingParams(), start),
                )
                for sequence in (10, 20, 30)
            )  # fmt: skip
            plan = StepPlan(start, parts)
            hidden = first.execute(plan).hidden
            assert hidden is not None
            assert hidden.shape == (3, 48)
            tokens.append(last.execute(plan, hidden).tokens)
            first.set_newest((10, 20, 30), tokens[-1])
        found.append(tokens)
    assert found[0] == found[1]


def test_what_runs_eagerly(kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    recorder, one = ReplayedOnCPU(), runner(PLAIN)
    one.capture_decode(2, recorder)
    plans = DecodePlans(PAGE, PAGES, 97, prompt=7).make()[:5]
    sampled = [decode(one, plans)[-1].samples]
    assert recorder.replays == 3  # neither the prompt nor three rows
    sampled.append(decode(runner(PLAIN), plans)[-1].samples)
    assert sampled[0] == sampled[1]
    one.reset()
    one.decoder.on_experts = lambda layer, experts: None
    decode(one, plans[:2])
    assert recorder.replays == 3  # somebody counts experts

    class Failing(ReplayedOnCPU):
        def capture(self, work: object) -> object:  # type: ignore[override]
            raise RuntimeError("operation not permitted when stream is capturing")

    other = runner(PLAIN)
    other.capture_decode(2, Failing())
    assert other._graphs is None
    assert "without CUDA graphs: operation not permitted" in caplog.text
    assert decode(other, plans)[-1].samples == sampled[0]


def test_sampled_rows_with_noise_take_their_logits_from_the_graph(kernels: None) -> None:
    noisy = SampleSpec(SamplingParams(temperature=1.0, seed=5), 0)
    parts = (
        SequenceSlice(1, 0, 1, 1, (5,), [0], 1, SampleSpec(SamplingParams(), 0)),
        SequenceSlice(2, 0, 1, 1, (9,), [1], 1, None),
        SequenceSlice(3, 0, 1, 1, (8,), [2], 1, noisy),
    )
    captured, eager = runner(PLAIN), runner(PLAIN)
    captured.capture_decode(4, ReplayedOnCPU())
    plan = StepPlan(1, parts)
    got, wanted = captured.execute(plan, keep_logits=True), eager.execute(plan, keep_logits=True)
    compare([got], [wanted], 1e-5)
    assert [sample.sequence for sample in got.samples] == [1, 3]


def test_row_counts() -> None:
    assert row_counts(1) == [1]
    assert row_counts(16) == [16, 8, 4, 2, 1]
    assert row_counts(17) == [17, 16, 8, 4, 2, 1]
    assert row_counts(31) == [31, 16, 8, 4, 2, 1]


def test_the_stand_in_is_as_strict_as_a_graph() -> None:
    x, out, factor = torch.ones(4), torch.zeros(4), [3.0]
    for work in (
        lambda: float(x.sum()),
        lambda: x[:2].tolist(),
        lambda: x + torch.tensor([1.0]),
        lambda: x if x.any() else None,
    ):
        with pytest.raises(AssertionError, match="host"):
            ReplayedOnCPU().capture(work)  # type: ignore[arg-type]
    kept: list[torch.Tensor] = []

    def work_once() -> None:
        kept.append(x * factor[0])
        out.copy_(kept[-1])

    recorder = ReplayedOnCPU()
    replay = recorder.capture(work_once)
    assert set(recorder.recordings[0].read) == {each.untyped_storage().data_ptr() for each in (x, out)}
    x.fill_(5)
    factor[0] = 100.0
    replay()
    assert out.tolist() == [15.0] * 4, "numbers are those of the capture, memory is as it is now"
    recorder.recordings[0].calls.clear()
    replay()
    assert kept[1].isnan().all(), "nothing is left of an earlier run"
