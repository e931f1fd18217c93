"""A whole model by the kernels of CUDA devices against the functions that CPUs use: the same logits and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.model.spec import DualChunkSpec, ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.attention import compiled as compiled_attention
from workers.attention.plan import Rotation
from workers.bench.model import benchmark_spec
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV, PlanMismatch
from workers.model.batch import PageTables
from workers.model.device.step import DeviceStep, rotate_heads
from workers.model.device.tables import DeviceTables
from workers.model.rope import Rotary, norm_and_rotate_
from workers.model.weights import dummy_shard, whole_model
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives

PAGE, CPU, PAGES = 16, torch.device("cpu"), 16
PLAIN = replace(
    benchmark_spec(layers=1), vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
CHUNKS = DualChunkSpec(chunk_size=48, local_size=16, original_max_position_embeddings=64)
DENSE = replace(PLAIN, num_experts=0, intermediate_size=64, qk_norm=False, dual_chunk=CHUNKS)
GREEDY = SampleSpec(SamplingParams(), 0)
IDS = torch.randint(3, 97, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def part(sequence: int, start: int, stop: int, first_page: int, sample: SampleSpec | None = None) -> SequenceSlice:
    """Rows of a sequence whose pages lie in descending order, from `first_page` on."""
    known, needed = -(-start // PAGE), -(-stop // PAGE)
    pages = [first_page - page for page in range(known, needed)]
    return SequenceSlice(sequence, start, stop - start, 40, IDS[start:stop], pages, needed, sample)


def steps() -> list[StepPlan]:
    """One sequence over three DCA chunks, another that joins and decodes with it; some steps mix both kinds of rows."""
    return [
        StepPlan(1, (part(1, 0, 17, 15),)),
        StepPlan(2, (part(1, 17, 96, 15, GREEDY),)),
        StepPlan(3, (part(1, 96, 97, 15, GREEDY), part(2, 0, 31, 5))),
        StepPlan(4, (part(2, 31, 40, 5, GREEDY), part(1, 97, 98, 15, GREEDY))),
        StepPlan(5, (part(1, 98, 99, 15, GREEDY), part(2, 40, 41, 5, GREEDY))),
    ]


def run(spec: ModelSpec, cache: torch.dtype) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    shard = whole_model(spec)
    kv = PagedKV(1, 2, 16, PAGES, PAGE, cache)
    runner = ModelRunner(spec, shard, dummy_shard(spec, shard, torch.float32, CPU), kv, Collectives(), CPU)
    outputs = [runner.execute(plan, keep_logits=True) for plan in steps()]
    return [out.logits for out in outputs if out.logits is not None], [out.tokens for out in outputs]


@pytest.mark.parametrize(("spec", "cache", "bound"), [
    (PLAIN, torch.float32, 1e-4), (DENSE, torch.float32, 1e-4), (DENSE, torch.int8, 2e-2),
    (PLAIN, torch.float8_e4m3fn, 5e-2),
], ids=["plain", "chunks", "chunks-int8", "plain-fp8"])  # fmt: skip
def test_prefill_and_decode(spec: ModelSpec, cache: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit codes may differ by one step where the values before them differ in their last bits."""
    wanted, tokens = run(spec, cache)
    monkeypatch.setattr(calls, "supports", lambda device: True)
    monkeypatch.setattr(compiled_attention, "supports", lambda q, kv: False)
    got, chosen = run(spec, cache)
    assert len(got) == len(wanted) == 4
    for mine, twin in zip(got, wanted, strict=True):
        assert (mine - twin).abs().max() <= bound * twin.abs().max()
    if cache == torch.float32:
        assert chosen == tokens


def test_what_a_step_brings_to_the_device() -> None:
    tables, kv = PageTables(PAGE), PagedKV(1, 2, 16, PAGES, PAGE, torch.float32)
    rotary, there = Rotary(DENSE.rope, 16, CPU, CHUNKS), DeviceTables(PAGES, CPU)
    for plan in steps():
        tables.apply(plan)
        batch = tables.batch(plan, DENSE, CPU)
        step = DeviceStep.of(batch, kv, rotary.rotations(batch.positions, batch.regions), 32, there)
        if plan.step == 4:
            assert step.decoding is not None
            assert step.decoding.tolist() == [0, 9]
            assert [piece.rows for piece in step.others] == [slice(1, 9)]  # cut at a DCA chunk
    assert step.rows is not None
    assert step.decoding is None
    assert not step.others
    assert len(step.tables) == 3
    assert step.rows.lengths.tolist() == [99, 41]
    assert step.rows.tables is there.slots
    assert step.rows.tables[step.rows.places, :3].tolist() == [[240, 224, 208], [80, 64, 48]]
    assert step.slots.tolist() == [144 + 2, 48 + 8]
    assert step.idle is None


def test_a_slot_outside_the_cache_is_refused() -> None:
    tables, kv = PageTables(PAGE), PagedKV(1, 2, 16, 2, PAGE, torch.float32)
    plan = StepPlan(1, (part(1, 0, 17, 9),))
    tables.apply(plan)
    batch = tables.batch(plan, PLAIN, CPU)
    with pytest.raises(PlanMismatch, match="outside the cache of 32 slots"):
        DeviceStep.of(batch, kv, Rotary(PLAIN.rope, 16).rotations(batch.positions), 0, DeviceTables(2, CPU))


def test_a_step_that_is_known_on_the_device_alone() -> None:
    """Rows that see no keys are idle."""
    from workers.kernels.triton.layer.decode import Rows

    positions = torch.tensor([40, 0, 7], dtype=torch.int32)
    numbers = torch.tensor([[0, 1, 2], [41, 0, 8]], dtype=torch.int32)
    rows = Rows(torch.zeros(3, 4, dtype=torch.int32), *numbers, torch.ones(3), PAGE, 32, 1)
    rotations = Rotary(DENSE.rope, 16, CPU, CHUNKS).rotations(positions, tuple(Rotation))
    step = DeviceStep.of_rows(numbers[1], rows, rotations)
    assert step.idle is not None
    assert step.idle.tolist() == [[False], [True], [False]]
    assert not step.others
    assert step.decoding is None
    assert [cos.shape for cos, _ in step.tables] == [(3, 1, 8)] * 3


@pytest.mark.parametrize("normed", [True, False])
def test_queries_are_rotated_without_keys(normed: bool) -> None:
    torch.manual_seed(1)
    qkv, norms = torch.randn(33, 6, 16), torch.rand(4, 16) + 0.5 if normed else None
    turns = [*Rotary(PLAIN.rope, 16, dual_chunk=CHUNKS).continuous(torch.arange(200, 233)).values()]
    got = rotate_heads(qkv[:, :4], norms, 1e-6, turns)
    wanted = [norm_and_rotate_(qkv[:, :4].clone(), turn, norms, 1e-6) for turn in turns]
    torch.testing.assert_close(got, torch.stack(wanted), atol=2e-6, rtol=2e-6)
