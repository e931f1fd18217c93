"""Penalties, biases and fewest tokens: the same answers on every layout, run ahead or not, and resumed anywhere."""

from __future__ import annotations

import random
from dataclasses import replace

from cluster.engine.outputs import Generation, GenerationSpec
from cluster.scheduler.request import Request
from cluster.scheduler.scheduler import Scheduler
from protos.stage.messages import SamplingParams
from tests.identity.conftest import Checkpoints
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline

COUNT = 24


class WaitingScheduler(Scheduler):
    """The reference: no step is planned before the tokens it continues are known."""

    def _wanted(self, running: list[Request]) -> list[int]:
        return [request.remaining for request in running]


def specs(vocab: int, stops: tuple[int, ...] = (), min_tokens: int = 0) -> list[GenerationSpec]:
    draw = random.Random(3)
    found = []
    for at, size in enumerate((17, 67, 193)):
        params = SamplingParams(
            temperature=0.7 * (at % 2), seed=at, repetition_penalty=1.0 + 0.2 * (at == 2),
            presence_penalty=(1.5, 0.0, -0.5)[at], frequency_penalty=(0.0, 1.25, 0.5)[at],
        )  # fmt: skip
        bias = {draw.randrange(vocab): draw.uniform(-3, 3) for _ in range(40)}
        prompt = [draw.randrange(5, vocab) for _ in range(size)]
        found.append(
            generation_spec(prompt, COUNT, params, logit_bias=bias, stop_token_ids=stops, min_tokens=min_tokens)
        )
    return found


def test_layouts_running_ahead_and_resumption(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, 1, 1, scheduler=WaitingScheduler) as pipeline:
        vocab = pipeline.spec.vocab_size
        free = pipeline.generate(*specs(vocab))
        plain = pipeline.generate(*(replace(one, options=replace(one.options, logit_bias=())) for one in specs(vocab)))
        stops = (free[0].token_ids[3], free[1].token_ids[20], free[2].token_ids[1])
        wanted = pipeline.generate(*specs(vocab, stops, 12))
    assert all(one.token_ids != other.token_ids for one, other in zip(free, plain, strict=True))
    assert all(not {*stops} & {*result.token_ids[:12]} for result in wanted)
    assert len({result.token_ids for result in wanted}) == 3
    for stages, ranks, chunk in ((2, 1, 64), (3, 1, 17), (1, 2, 33), (2, 2, 256)):
        with Pipeline(folder, stages, ranks, chunk=chunk) as pipeline:
            check(pipeline.generate(*specs(vocab, stops, 12)), wanted)
            cut = random.Random(chunk).randrange(1, 12)
            again = [
                replace(one, resume=result.samples[:cut])
                for one, result in zip(specs(vocab, stops, 12), wanted, strict=True)
            ]
            check(pipeline.generate(*again), wanted)


def check(found: list[Generation], wanted: list[Generation]) -> None:
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    assert [result.finish_reason for result in found] == [result.finish_reason for result in wanted]
