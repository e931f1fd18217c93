"""The values that a job samples with, and the length scale of its questions: decided once, the same after a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.access.codec import encode_job
from cluster.jobs.model import InvalidJob, JobInput, JobSpec
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import to_dict
from protos.jobs.sampling import AnswerOptions, Sampling, SamplingParams
from protos.model.spec import DualChunkSpec
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

QWEN3 = SamplingParams(0.6, 20, 0.95)


def with_defaults(bench: Bench, sampling: SamplingParams) -> Bench:
    bench.runtime.deployment = replace(bench.runtime.deployment, sampling=sampling)
    return bench


def used(bench: Bench) -> set[SamplingParams]:
    slices = [part for plan in bench.runtime.shard.plans for part in plan.slices]
    return {part.sample.params for part in slices if part.sample is not None}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Sampling(seed=3), replace(QWEN3, seed=3)),
        (Sampling(temperature=0.0, seed=3), replace(QWEN3, temperature=0.0, seed=3)),
        (Sampling(top_k=0, top_p=1.0, seed=3, logprobs=1), SamplingParams(0.6, seed=3, logprobs=1)),
        (SamplingParams(), SamplingParams()),
    ],
)
def test_what_the_request_says_goes_before_the_model(
    bench: Bench, said: Sampling | SamplingParams, expected: SamplingParams
) -> None:
    with_defaults(bench, QWEN3)
    record = bench.service.submit(JobSpec(JobInput(token_ids=(5, 6)), AnswerOptions(max_tokens=2, sampling=said)))
    bench.service.wait(record.id, 20)
    assert used(bench) == {expected}
    assert record.reproducibility["sampling"] == expected.to_json()
    shown = to_dict(encode_job(bench.service.get(record.id), []))["reproducibility"]
    assert (shown["sampling"], shown["seed"]) == (expected.to_json(), expected.seed)


def test_a_restart_under_other_defaults_changes_nothing(bench: Bench) -> None:
    with_defaults(bench, QWEN3)
    bench.runtime.shard.hold()
    spec = JobSpec(JobInput(token_ids=(5, 6)), AnswerOptions(max_tokens=6), idempotency_key="k")
    record = bench.service.submit(spec)
    bench.runtime.shard.let(3)
    eventually(lambda: len(bench.ids(record.id)) == 3)
    (before,) = used(bench)
    bench.restart()  # greedy now
    assert bench.service.submit(spec).id == record.id, "the same request is the same job"
    assert bench.service.wait(record.id, 20).reproducibility == record.reproducibility
    assert used(bench) == {before}, "the seed is the same too"
    assert before == replace(QWEN3, seed=before.seed)
    assert bench.ids(record.id) == [100, 101, 102, 103, 104, 105]


def test_jobs_of_before_say_every_value_themselves(bench: Bench) -> None:
    record = bench.service.submit(
        JobSpec(JobInput(token_ids=(5,)), AnswerOptions(sampling=SamplingParams(0.5, seed=9)))
    )
    old = replace(record, reproducibility={name: v for name, v in record.reproducibility.items() if name != "sampling"})
    assert old.ask.sampling_params == SamplingParams(0.5, seed=9)
    assert to_dict(encode_job(old, []))["reproducibility"]["sampling"] == {}


@pytest.mark.parametrize("stored", [5, [1], {"temperature": -1.0}, {"temperature": "warm"}])
def test_stored_values_that_cannot_be_read_are_named(bench: Bench, stored: object) -> None:
    record = bench.service.submit(JobSpec(JobInput(token_ids=(5,)), AnswerOptions()))
    with pytest.raises(InvalidJob, match=r"^reproducibility.sampling: cannot be read .*: submit the job again$"):
        assert replace(record, reproducibility={"sampling": stored}).ask


def test_questions_of_a_job_use_the_length_scale_of_the_longest(make: Callable[..., Bench]) -> None:
    bench = make(seqs=4)
    spec = replace(bench.runtime.deployment.spec, dual_chunk=DualChunkSpec(96, 32, 48))
    bench.runtime.deployment = replace(bench.runtime.deployment, spec=spec)
    document = bench.service.documents.put("a", [b"The code of dark river is 1."], 1 << 20)
    questions = ("What is it?", "What is the code of dark river, please?", "Where?")
    pinned: list[int] = []
    submit_all = bench.runtime.engine.submit_all

    def note(items, after=0):  # type: ignore[no-untyped-def]
        pinned.extend(spec.pinned_len for spec, _ in items)
        return submit_all(items, after)

    bench.runtime.engine.submit_all = note  # type: ignore[method-assign]
    record = bench.service.submit(JobSpec(JobInput(document_id=document.id, questions=questions), AnswerOptions()))
    prompts = [answer.prompt_tokens for answer in bench.service.wait(record.id, 20).answers]
    assert len(set(prompts)) == 3
    assert pinned == [max(prompts)] * 3
    assert record.reproducibility["scale_len"] == max(prompts)
    job = pb.Job(reproducibility=pb.Reproducibility(scale_len=max(prompts)))
    assert encode_job(record, []).reproducibility.scale_len == job.reproducibility.scale_len
