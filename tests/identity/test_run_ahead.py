"""Tokens that do not pass through the head: with steps planned ahead a pipeline answers as without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.engine.outputs import Generation, GenerationSpec
from cluster.scheduler.request import Request
from cluster.scheduler.scheduler import Scheduler
from protos.stage.messages import SamplingParams
from tests.identity.conftest import Checkpoints
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.integrity import check_engine

GREEDY = SamplingParams()
KINDS = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=7),
    SamplingParams(temperature=1.1, top_k=40, top_p=0.95, seed=8, repetition_penalty=1.2),
    SamplingParams(repetition_penalty=1.3, logprobs=2),
]


def specs(vocab: int, stops: Sequence[int] = ()) -> list[GenerationSpec]:
    """Requests of every kind of sampling that end at different steps."""
    draw = random.Random(5)
    counts = (1, 2, 9, 24, 40, 17, 33, 5)
    return [
        generation_spec(
            [draw.randrange(5, vocab) for _ in range(1 + 13 * at)], count, KINDS[at % 4], stop_token_ids=tuple(stops)
        )
        for at, count in enumerate(counts)
    ]


class WaitingScheduler(Scheduler):
    """The reference: no step is planned before the tokens it continues are known."""

    def _wanted(self, running: list[Request]) -> list[int]:
        return [request.remaining for request in running]


def answers(folder: Path, stages: int, ranks: int, ahead: bool, stops: Sequence[int] = ()) -> list[Generation]:
    scheduler = Scheduler if ahead else WaitingScheduler
    with Pipeline(folder, stages, ranks, chunk=64, pages=128, scheduler=scheduler) as pipeline:
        found = pipeline.generate(*specs(pipeline.spec.vocab_size, stops))
        again = pipeline.generate(*specs(pipeline.spec.vocab_size, stops)[3:4])  # alone, on what is left behind
        blind = sum(not part.token_ids for plan in pipeline.plans for part in plan.slices)
        assert (blind > 0) == ahead
    assert again[0].token_ids == found[3].token_ids
    return found


@pytest.mark.parametrize(("stages", "ranks"), [(2, 1), (3, 1), (2, 2)])
def test_running_ahead_changes_no_token(stages: int, ranks: int, checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    plain = answers(folder, stages, ranks, ahead=False)
    ahead = answers(folder, stages, ranks, ahead=True)
    assert [result.token_ids for result in ahead] == [result.token_ids for result in plain]
    assert [len(result.token_ids) for result in plain] == [1, 2, 9, 24, 40, 17, 33, 5]
    assert [[token.token_id for token in result.samples] for result in ahead] == [list(r.token_ids) for r in plain]


def test_ends_nobody_foresaw(checkpoint: Checkpoints) -> None:
    """Stop ids end sequences while steps of theirs are in flight; the others go on undisturbed."""
    folder = checkpoint("qwen3_moe")
    free = answers(folder, 2, 1, ahead=False)
    stops = [free[3].token_ids[6], free[4].token_ids[11], free[6].token_ids[2]]
    plain, ahead = (answers(folder, 2, 1, ahead, stops) for ahead in (False, True))
    assert [r.token_ids for r in ahead] == [r.token_ids for r in plain]
    assert [r.finish_reason for r in ahead] == [r.finish_reason for r in plain]
    assert sum(len(r.token_ids) for r in plain) < sum(len(r.token_ids) for r in free)


def test_cancelled_sequences_leave_no_token_behind(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    plain = answers(folder, 2, 1, ahead=False)
    with Pipeline(folder, 2, 1, chunk=64, pages=128) as pipeline:
        for _ in range(3):
            wanted = specs(pipeline.spec.vocab_size)
            handles = pipeline.engine.submit_all([(spec, lambda event: None) for spec in wanted])
            while len(handles[4].request.output) < 6:
                assert not handles[4].done.wait(0.001)
            for at in (3, 4, 6):
                pipeline.engine.cancel(handles[at])
            found = [handle.wait(60) for handle in handles]
            for at, (got, whole) in enumerate(zip(found, plain, strict=True)):
                assert got.token_ids == whole.token_ids[: len(got.token_ids)]
                assert len(got.token_ids) == len(whole.token_ids) or at in (3, 4, 6)
            check_engine(pipeline.engine)
