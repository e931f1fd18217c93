"""The largest step is executed once, and what it took is what the device says; figures of a device stand in for one."""

from __future__ import annotations

import importlib.util
import weakref
from dataclasses import replace
from typing import cast

import pytest
import torch

from cluster.config.gpu_memory import GpuStep, step_bytes
from protos.model.spec import DualChunkSpec, HeadBudget, SparseSpec
from protos.stage.messages import ShardSpec, Span, StepPlan
from workers.bench.model import benchmark_spec
from workers.bench.trace import meta_runner, trace_step
from workers.kv.paged import PagedKV
from workers.model.weights import dummy_shard, whole_model
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.runner.rehearsal import StepSize, largest_plan, rehearse, warm_up
from workers.transport.collectives import Collectives

CPU = torch.device("cpu")
SPEC = replace(
    benchmark_spec(layers=2), vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=0, intermediate_size=64,
)  # fmt: skip


class Memory:
    """What `torch.cuda` would say: 1,000 bytes before the step, and `peak` at most during it."""

    def __init__(self, peak: int) -> None:
        self._peak, self.calls = peak, list[str]()
        self.runners: list[weakref.ref[ModelRunner]] = []

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        assert not self.runners or self.runners.pop()() is None, "nobody holds what the step had"

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append("reset")

    def memory_allocated(self, device: torch.device) -> int:
        return 1000

    def max_memory_allocated(self, device: torch.device) -> int:
        self.calls.append("peak")
        return self._peak


class Recorded:
    """Makes runners over a cache; notes their plans and what their caches hold before."""

    def __init__(self, shard: ShardSpec, error: Exception | None = None) -> None:
        self.shard, self.error = shard, error
        self.made: list[weakref.ref[ModelRunner]] = []
        self.out = StepOutput()
        self.plans: list[StepPlan] = []
        self.hidden: torch.Tensor | None = None
        self._weights = dummy_shard(SPEC, shard, torch.float32, CPU)

    def __call__(self, kv: PagedKV) -> ModelRunner:
        recorded = self
        assert all(not kv.layer(layer).keys.any() for layer in range(kv.num_layers))

        class Runner(ModelRunner):
            def execute(
                self, plan: StepPlan, hidden: torch.Tensor | None = None, keep_logits: bool = False
            ) -> StepOutput:
                recorded.plans.append(plan)
                recorded.hidden = hidden
                if recorded.error is not None:
                    raise type(recorded.error)(*recorded.error.args)  # whose traceback nobody keeps
                recorded.out = super().execute(plan, hidden, keep_logits)
                return recorded.out

        runner = Runner(SPEC, self.shard, self._weights, kv, Collectives())
        self.made.append(weakref.ref(runner))
        return runner


def page(layers: int = 2) -> PagedKV:
    return PagedKV(layers, 2, 16, 1, 16, torch.float32)


def test_the_step_runs_on_one_page_and_its_peak_is_returned() -> None:
    memory, made = Memory(5000), Recorded(whole_model(SPEC))
    assert rehearse(made, page(), SPEC, StepSize(67, 193, 16), memory) == 4000
    (plan,) = made.plans
    assert (plan.slices[0].start, plan.slices[0].length) == (126, 67)
    assert memory.calls == ["synchronize", "reset", "synchronize", "peak", "empty_cache"]


def test_later_stages_get_activations_which_count() -> None:
    memory = Memory(5000)
    made = Recorded(replace(whole_model(SPEC), stage=1, num_stages=2, layers=Span(1, 2)))
    assert rehearse(made, page(1), SPEC, StepSize(17, 17, 16), memory) == 4000 + 17 * 48 * 4
    assert made.hidden is not None
    assert made.hidden.shape == (17, 48)


def test_a_device_that_is_too_small_is_told_with_the_way_out() -> None:
    memory, made = Memory(0), Recorded(whole_model(SPEC), error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        ValueError, match=r"^prefill.max_num_batched_tokens: 67: .* context of 193 does not fit.*lower it"
    ):
        rehearse(made, page(), SPEC, StepSize(67, 193, 16), memory)
    assert memory.calls[-1] == "empty_cache"


def test_a_step_that_need_not_fit_is_none(caplog: pytest.LogCaptureFixture) -> None:
    memory, made = Memory(0), Recorded(whole_model(SPEC), error=torch.OutOfMemoryError("CUDA out of memory"))
    made.made = memory.runners
    assert rehearse(made, page(), SPEC, StepSize(67, 193, 16), memory, must_fit=False) == 0
    assert (memory.calls[-1], memory.runners) == ("empty_cache", [])
    assert "67 tokens at the end of a context of 193, the longest that KV may hold, does not fit" in caplog.text


@pytest.mark.parametrize(("tokens", "sampled", "rows"), [(67, 5, 5), (67, 200, 67), (1, 5, 1), (67, 1, 1)])
def test_as_many_rows_are_sampled_as_a_step_may_have(tokens: int, sampled: int, rows: int) -> None:
    memory, made = Memory(5000), Recorded(whole_model(SPEC))
    assert rehearse(made, page(), SPEC, StepSize(tokens, 193, 16, sampled), memory) == 4000
    (plan,) = made.plans
    assert plan.num_tokens == tokens
    assert (len(made.out.samples), len(made.out.targets)) == (rows, min(64, tokens - rows + 1))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("sampled", "logits"), [(1, 64 * 20), (220, 220 * 6)])
def test_rows_that_are_scored_or_sampled_are_in_the_peak(sampled: int, logits: int) -> None:
    """Of a vocabulary that takes more than all layers, traced without memory; and in the account."""
    spec = replace(SPEC, vocab_size=400_000)
    plan = largest_plan(spec, StepSize(300, 400, 16, sampled))
    peak = trace_step(meta_runner(spec, whole_model(spec), 25, 16, torch.bfloat16), plan).peak_bytes
    account = step_bytes(spec, whole_model(spec), GpuStep(300, 400, sampled))
    assert logits * 400_000 < peak <= account <= peak / 0.9


@pytest.mark.parametrize(
    ("sparse", "chunk", "expected"),
    [
        (None, None, (900, 100)),
        (SparseSpec(threshold=32, cell=64, uniform=HeadBudget(8, 8)), None, (896, 64)),
        (SparseSpec(threshold=32, cell=64, uniform=HeadBudget(8, 8)), DualChunkSpec(96, 16), (896, 64)),
        (SparseSpec(threshold=2000, cell=64, uniform=HeadBudget(8, 8)), None, (900, 100)),
    ],
)
def test_the_largest_step_is_at_the_end_and_has_whole_cells(
    sparse: SparseSpec | None, chunk: DualChunkSpec | None, expected: tuple[int, int]
) -> None:
    spec = replace(SPEC, sparse=sparse, dual_chunk=chunk)
    (part,) = largest_plan(spec, StepSize(100, 1000, 16)).slices
    assert (part.start, part.length) == expected
    assert part.num_pages == len(part.new_pages) == -(-(part.start + part.length) // 16)


def test_rows_that_are_sampled_lie_beside_the_prompt_or_on_top_of_its_cells() -> None:
    long, *short = largest_plan(SPEC, StepSize(100, 1000, 16, 4)).slices
    assert (long.start, long.length) == (903, 97)
    assert [(part.sequence, part.start, part.length) for part in short] == [(1, 0, 1), (2, 0, 1), (3, 0, 1)]
    sparse = SparseSpec(threshold=32, cell=64, uniform=HeadBudget(8, 8))
    long, *short = largest_plan(replace(SPEC, sparse=sparse), StepSize(192, 1024, 16, 4)).slices
    assert (long.start, long.length, len(short)) == (832, 192, 3)


def test_contexts_shorter_than_a_step() -> None:
    (part,) = largest_plan(SPEC, StepSize(100, 40, 16)).slices
    assert (part.start, part.length) == (0, 40)


def test_the_small_step_is_forgotten() -> None:
    seen: list[StepPlan] = []

    class Runner:
        shard, hidden_size, dtype, device = whole_model(SPEC), SPEC.hidden_size, torch.float32, torch.device("cpu")

        def execute(self, plan: StepPlan, hidden: torch.Tensor | None) -> None:
            assert hidden is None
            seen.append(plan)

        def reset(self) -> None:
            seen.append(StepPlan(1, ()))

    warm_up(cast(ModelRunner, Runner()), 8)
    assert [(plan.step, plan.num_tokens) for plan in seen] == [(0, 8), (1, 0)]
