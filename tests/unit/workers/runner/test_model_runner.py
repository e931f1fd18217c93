"""One shard in one process: chunks of any size and stages of any cut give the logits of a whole prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, Span, StepPlan
from workers.bench.model import benchmark_spec
from workers.kv.paged import PagedKV, PlanMismatch
from workers.model.weights import dummy_shard, whole_model
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.transport.collectives import Collectives

PAGE, TOTAL, CPU = 16, 193, torch.device("cpu")
SPEC = replace(
    benchmark_spec(layers=2), vocab_size=320, hidden_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=64,
)  # fmt: skip
PROMPT = torch.randint(5, 320, (TOTAL,), generator=torch.Generator().manual_seed(0)).tolist()


def runner(stage: int = 0, stages: int = 1) -> ModelRunner:
    shard = whole_model(SPEC)
    if stages > 1:
        shard = replace(shard, stage=stage, num_stages=stages, layers=Span(stage, stage + 1))
    kv = PagedKV(shard.layers.size, 2, 32, -(-TOTAL // PAGE), PAGE, torch.float32)
    return ModelRunner(SPEC, shard, dummy_shard(SPEC, shard, torch.float32, CPU), kv, Collectives(), CPU)


def plans(chunk: int) -> list[StepPlan]:
    made = []
    for step, start in enumerate(range(0, TOTAL, chunk)):
        stop = min(start + chunk, TOTAL)
        pages = range(-(-start // PAGE), -(-stop // PAGE))
        sample = SampleSpec(SamplingParams(), 0) if stop == TOTAL else None
        ids = PROMPT[start:stop]
        made.append(StepPlan(step, (SequenceSlice(7, start, stop - start, TOTAL, ids, pages, pages.stop, sample),)))
    return made


def last(one: ModelRunner, chunk: int) -> StepOutput:
    return [one.execute(plan, keep_logits=True) for plan in plans(chunk)][-1]


@pytest.mark.parametrize("chunk", [1, 17, 67])
def test_chunks_give_the_logits_of_the_whole_prompt(chunk: int) -> None:
    whole, cut = last(runner(), TOTAL), last(runner(), chunk)
    assert whole.logits is not None
    assert cut.logits is not None
    torch.testing.assert_close(cut.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert cut.tokens == whole.tokens == (int(whole.logits.argmax()),)


def test_two_stages_give_the_logits_of_one() -> None:
    whole, stages = last(runner(), 67), [runner(0, 2), runner(1, 2)]
    for plan in plans(67):
        first = stages[0].execute(plan)
        assert first.hidden is not None
        assert first.samples == ()
        out = stages[1].execute(plan, first.hidden, keep_logits=True)
    assert out.logits is not None
    assert whole.logits is not None
    torch.testing.assert_close(out.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_a_plan_of_releases_has_nothing_to_compute() -> None:
    one = runner()
    last(one, 67)
    assert one.execute(StepPlan(3, (), released=(7,))) == StepOutput()


def test_a_plan_that_does_not_continue_is_refused_until_a_reset() -> None:
    one = runner()
    expected = last(one, 67)
    with pytest.raises(PlanMismatch):
        one.execute(plans(67)[1])
    one.reset()
    again = last(one, 67)
    assert again.tokens == expected.tokens


def test_the_device_has_settled_before_tokens_are_read() -> None:
    one = runner()
    calls: list[int] = []
    with one.settled_by(lambda: calls.append(one.decoder.layers_done)):
        for plan in plans(67):
            one.execute(plan)
    assert calls == [6]  # after the two layers of the last of three steps, which is the only one that samples
    one.reset()
    last(one, 67)
    assert len(calls) == 1
