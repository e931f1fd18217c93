"""Layers in one call of the compiled kernels against the decoder that calls the operations one by one: equal bits."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as GgufKind

from protos.model.config_json import load_model_spec
from protos.model.quant.scheme import QuantScheme
from protos.model.spec import DualChunkSpec, ModelSpec, RopeSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan
from tests.support.data.checkpoints import make_checkpoint
from tests.support.data.packing import random_weight
from tests.support.gguf_files import convert
from workers.bench.model import benchmark_spec
from workers.kernels.build import load
from workers.kv.paged import PagedKV, PlanMismatch, SlotRun
from workers.model import compiled
from workers.model.batch import Batch
from workers.model.fused import FusedLayers
from workers.model.weights import ShardWeights, dummy_shard, load_shard, whole_model
from workers.quant.packed import PackedWeight, pack
from workers.quant.weight import RowStack
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.transport.collectives import Collectives

PAGE, PAGES = 16, 60
CPU, BF16 = torch.device("cpu"), torch.bfloat16
DUAL = DualChunkSpec(64, 16, 32)  # chunks of 48 tokens
SPEC = replace(
    benchmark_spec(layers=2), vocab_size=320, hidden_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=64,
)  # fmt: skip
SPECS = {
    "plain": SPEC,
    "dual chunk": replace(SPEC, dual_chunk=DUAL, rope=RopeSpec(1e6)),
    "dense": replace(SPEC, num_experts=0, num_experts_per_tok=0, intermediate_size=160),
    "int4": replace(SPEC, quant=QuantScheme("gptq", 4, group=32, zero_offset=1)),
    "dense, FP8": replace(
        SPEC,
        num_experts=0,
        num_experts_per_tok=0,
        intermediate_size=160,
        quant=QuantScheme("fp8", 8, is_float=True, group=32, block_rows=32),
    ),
    "biases, no head norms": replace(SPEC, qkv_bias=True, o_bias=True, qk_norm=False, norm_topk_prob=False),
}

pytestmark = pytest.mark.skipif(
    compiled.path() is None, reason=f"no compiled kernels: {load().reason or 'this CPU has no AVX2'}"
)


class Doubling(Collectives):
    """Stands for a stage of two shards: the sum of what both compute is twice what one does."""

    size = 2

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


def weights_of(spec: ModelSpec, shard: ShardSpec) -> ShardWeights:
    weights = dummy_shard(spec, shard, BF16, CPU)
    generator = torch.Generator().manual_seed(5)
    for layer in weights.layers:
        for bias in (layer.qkv_bias, layer.o_bias):
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator))
    return weights


def runners(
    spec: ModelSpec, shard: ShardSpec | None = None, collectives: Collectives | None = None,
    weights: ShardWeights | None = None, cache: torch.dtype = BF16,
) -> tuple[ModelRunner, ModelRunner]:  # fmt: skip
    """One that fuses, and one that does not."""
    shard = shard or whole_model(spec)
    weights = weights or weights_of(spec, shard)
    made = []
    for _ in range(2):
        kv = PagedKV(len(weights.layers), shard.kv_heads.size, spec.head_dim, PAGES, PAGE, cache)
        for tensor in stored(kv):
            tensor.zero_()
        made.append(ModelRunner(spec, shard, weights, kv, collectives or Collectives(), CPU))
    assert made[0].decoder._fused is not None
    made[1].decoder._fused = None
    return made[0], made[1]


def stored(kv: PagedKV) -> list[torch.Tensor]:
    return [kv._data] if kv._scales is None else [kv._data, kv._scales]


class Sequences:
    """Plans for several sequences whose pages lie between each other's."""

    def __init__(self, number: int) -> None:
        self.lengths = [0] * number
        self.pages: list[int] = [0] * number
        self.steps = count()
        self.free = iter(range(PAGES))
        self.generator = torch.Generator().manual_seed(number)

    def step(self, *rows: int) -> StepPlan:
        """The next `rows[i]` tokens of sequence i, sampled after the last."""
        slices = []
        for sequence, length in enumerate(rows):
            if not length:
                continue
            start = self.lengths[sequence]
            needed = -(-(start + length) // PAGE) - self.pages[sequence]
            new = [next(self.free) for _ in range(needed)]
            self.pages[sequence] += needed
            self.lengths[sequence] += length
            ids = torch.randint(5, 320, (length,), generator=self.generator).tolist()
            sample = SampleSpec(SamplingParams(), 0, ())
            slices.append(SequenceSlice(sequence, start, length, 40, ids, new, self.pages[sequence], sample))
        return StepPlan(next(self.steps), tuple(slices))


def layers(runner: ModelRunner, x: torch.Tensor, batch: Batch) -> torch.Tensor:
    return runner.decoder.layers(x, runner.decoder.prepare(batch, runner._kv))


def equal(got: StepOutput, wanted: StepOutput) -> None:
    assert got.logits is not None
    assert wanted.logits is not None
    assert torch.equal(got.logits, wanted.logits)
    assert got.samples == wanted.samples


@pytest.mark.parametrize("cache", [BF16, torch.int8], ids=["bf16 KV", "int8 KV"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_steps_are_equal_bit_for_bit(spec: ModelSpec, cache: torch.dtype) -> None:
    """Prompts in several chunks, then decode steps of one and of three sequences, across chunks of dual attention."""
    ours, plain = runners(spec, cache=cache)
    plans = Sequences(3)
    steps = [plans.step(17), plans.step(67, 3), plans.step(0, 45, 64), plans.step(1)]
    steps += [plans.step(1, 1, 1) for _ in range(60)]
    steps += [plans.step(0, 1), plans.step(2, 0, 1)]
    for plan in steps:
        equal(ours.execute(plan, keep_logits=True), plain.execute(plan, keep_logits=True))
        assert all(map(torch.equal, stored(ours._kv), stored(plain._kv)))
    assert ours.decoder._fused is not None
    assert ours.decoder._fused.layers_done >= 2 * 63
    assert ours.decoder.layers_done == plain.decoder.layers_done == 2 * len(steps)


def mixed_stack(spec: ModelSpec, shard: ShardSpec) -> RowStack:
    """Queries and keys in 4 bits, values in 8, as K-quants of GGUF files have them."""
    hidden, rows = spec.hidden_size, [heads.size * spec.head_dim for heads in (shard.heads, shard.kv_heads)]
    four = [random_weight("int4", (count, hidden), 32, torch.float16, seed=count) for count in rows]
    return RowStack((*map(pack, four), pack(random_weight("int8", (rows[1], hidden), 16))))


def mixed_steps() -> list[StepPlan]:
    """Prompts, then decode steps of 1, 2 and 4 rows."""
    plans = Sequences(4)
    return [
        plans.step(17, 5), plans.step(0, 0, 33, 1), *(plans.step(0, 1) for _ in range(3)),
        *(plans.step(1, 0, 1) for _ in range(3)), *(plans.step(1, 1, 1, 1) for _ in range(20)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "dual chunk", "dense", "int4", "biases, no head norms"])
def test_values_of_another_type_than_queries(name: str) -> None:
    spec = SPECS[name]
    weights = weights_of(spec, whole_model(spec))
    weights.layers[1].qkv_weight = mixed_stack(spec, whole_model(spec))  # beside a layer of one type
    ours, apart = runners(spec, weights=weights)
    for plan in (steps := mixed_steps()):
        equal(ours.execute(plan, keep_logits=True), apart.execute(plan, keep_logits=True))
        assert torch.equal(ours._kv._data, apart._kv._data)
    assert ours.decoder._fused is not None
    assert ours.decoder._fused.layers_done == 2 * len(steps)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
def test_a_file_of_mixed_types(tmp_path: Path, family: str) -> None:
    experts = {"moe_intermediate_size": 64, "num_experts": 16} if family == "qwen3_moe" else {"intermediate_size": 128}
    folder = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=2, vocab_size=320, head_dim=32, **experts)
    kinds = {"blk.0.attn_v": GgufKind.Q8_0, "ffn_down": GgufKind.Q5_0, "ffn_gate_inp": GgufKind.F32}

    def kind_of(name: str) -> GgufKind:
        return next((kind for part, kind in kinds.items() if part in name), GgufKind.Q4_1)

    path = convert(folder, tmp_path / "m.gguf", kind_of)
    spec = load_model_spec(path)
    weights = load_shard(path, spec, whole_model(spec), BF16, "cpu")
    assert isinstance(weights.layers[0].qkv_weight, RowStack)
    assert isinstance(weights.layers[1].qkv_weight, PackedWeight)
    ours, apart = runners(spec, weights=weights)
    for plan in mixed_steps():
        equal(ours.execute(plan, keep_logits=True), apart.execute(plan, keep_logits=True))


def test_shards_of_mixed_types() -> None:
    shard = ShardSpec(0, 1, 0, 2, Span(0, 2), Span(0, 2), Span(0, 1), Span(0, 8), Span(0, 0), Span(0, 320))
    weights = weights_of(SPEC, shard)
    for layer in weights.layers:
        layer.qkv_weight = mixed_stack(SPEC, shard)
    ours, apart = runners(SPEC, shard, Doubling(), weights)
    for plan in mixed_steps():
        for runner in (ours, apart):
            runner._tables.apply(plan)
        batch = ours._tables.batch(plan, SPEC, CPU)
        x = torch.randn(len(batch.positions), SPEC.hidden_size, dtype=BF16)
        assert torch.equal(layers(ours, x, batch), layers(apart, x, batch))


def test_a_part_that_is_not_packed_is_not_supported() -> None:
    weights = weights_of(SPEC, whole_model(SPEC))
    stack = mixed_stack(SPEC, whole_model(SPEC))
    weights.layers[0].qkv_weight = RowStack((*stack.parts[:2], stack.parts[2].dequantize(BF16)))
    assert not FusedLayers.supports_weights(SPEC, weights.layers)


def test_shards_reduce_between_the_halves() -> None:
    shard = ShardSpec(0, 1, 0, 2, Span(0, 2), Span(0, 2), Span(0, 1), Span(0, 8), Span(0, 0), Span(0, 320))
    ours, plain = runners(SPECS["dual chunk"], shard, Doubling())
    plans = Sequences(2)
    for plan in (plans.step(50, 3), *(plans.step(1, 1) for _ in range(20))):
        batches = [runner._tables.apply(plan) for runner in (ours, plain)]
        assert batches == [None, None]
        batch = ours._tables.batch(plan, ours._spec, CPU)
        x = torch.randn(len(batch.positions), SPEC.hidden_size, dtype=BF16)
        kept = x.clone()
        got, wanted = (layers(runner, x, batch) for runner in (ours, plain))
        assert torch.equal(got, wanted)
        assert torch.equal(x, kept)
    assert ours.decoder.layers_done == 2 * 21


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, num_experts=0, num_experts_per_tok=0, mlp_bias=True), "dense with biases"),
        (replace(SPEC, num_experts=0, num_experts_per_tok=0, intermediate_size=168), "dense, no whole tiles"),
        (replace(SPEC, mlp_only_layers=(1,)), "one layer is dense"),
        (replace(SPEC, head_dim=24), "head dim"),
        (replace(SPEC, num_experts=6), "unpacked router"),
        (replace(SPEC, moe_intermediate_size=40), "unpacked experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_are_not_supported(spec: ModelSpec, reason: str) -> None:
    assert not FusedLayers.supports_weights(spec, dummy_shard(spec, whole_model(spec), BF16, CPU).layers)


def test_other_types_and_long_steps_are_not_supported() -> None:
    ours, _ = runners(SPEC)
    layers = ours.decoder._fused
    assert layers is not None
    plans = Sequences(1)
    for rows, taken in ((64, True), (65, False)):
        ours._tables.apply(plan := plans.step(rows))
        batch = ours._tables.batch(plan, SPEC, CPU)
        assert layers.supports_step(batch, ours._kv) is taken
        assert not layers.supports_step(batch, PagedKV(2, 2, SPEC.head_dim, PAGES, PAGE, torch.float32))


@pytest.mark.parametrize("value", [0.0, 1e-40, float("inf"), float("nan")])
def test_int8_keys_and_values_of_zeros_and_of_numbers_that_are_not_finite(value: float) -> None:
    """A row of zeros stays one, and one that is not finite keeps a scale that says so, as `quantise` has it."""
    weights = weights_of(SPEC, whole_model(SPEC))
    ours, plain = runners(SPEC, weights=weights, cache=torch.int8)
    x = torch.full((1, SPEC.hidden_size), value, dtype=BF16)
    plans = Sequences(1)
    for runner, plan in ((ours, step := plans.step(1)), (plain, step)):
        runner._tables.apply(plan)
        layers(runner, x, runner._tables.batch(plan, SPEC, CPU))
    codes, scales = zip(*map(stored, (ours._kv, plain._kv)), strict=True)
    torch.testing.assert_close(scales[0], scales[1], rtol=0, atol=0, equal_nan=True)
    finite = scales[0].isfinite()
    assert torch.equal(codes[0][finite], codes[1][finite])
    assert finite.all() == (value in (0.0, 1e-40))


def test_a_slot_outside_the_cache_is_refused_before_anything_is_written() -> None:
    ours, _ = runners(SPEC)
    plans = Sequences(1)
    ours._tables.apply(plan := plans.step(3))
    batch = ours._tables.batch(plan, SPEC, CPU)
    before = ours._kv._data.view(torch.int16).clone()
    x = torch.randn(3, SPEC.hidden_size, dtype=BF16)
    for run in (SlotRun(PAGES * PAGE - 2, 3), SlotRun(-1, 3), SlotRun(0, 2)):
        with pytest.raises(PlanMismatch, match="outside the cache"):
            layers(ours, x, replace(batch, slots=(run,)))
    assert torch.equal(ours._kv._data.view(torch.int16), before)
