"""Constraints of durable jobs: refused at submission, the same answer after the head or the pipeline was replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.constraints import compiler
from cluster.constraints.trial import CompilerBusy
from cluster.jobs.model import InvalidJob, JobInput, JobSpec, JobState, ServiceBusy
from cluster.text.tools.formats import ToolFormat, scan_answer
from protos.jobs.chat import ChatMessage, Tool, ToolChoice
from protos.jobs.constraint import Constraint
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
SCHEMA = {
    "type": "object", "properties": {"words": {"type": "array", "items": {"enum": ["the", "then"]}, "minItems": 9,
    "maxItems": 9}}, "required": ["words"], "additionalProperties": False,
}  # fmt: skip
OPTIONS = AnswerOptions(400, structured_outputs=Constraint.from_value({"json": SCHEMA}))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(compiler, "try_grammar", lambda *_: None)
    made = Bench(tmp_path)
    yield made
    made.close()


def answer(bench: Bench, job_id: str) -> str:
    bench.reaches(job_id, JobState.SUCCEEDED)
    (one,) = bench.service.get(job_id).answers
    assert one.finish_reason == "stop"
    value = json.loads(one.text)
    assert len(value["words"]) == 9
    assert {*value["words"]} <= {"the", "then"}
    return one.text


def test_answers_go_on_after_the_end_of_head_and_pipeline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(bench, bench.submit(ask=OPTIONS))
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.restart()
    job_id = bench.submit(ask=OPTIONS)
    for head_ends in (True, False, True, False):
        before, shard = len(bench.ids(job_id)), bench.runtime.shard
        shard.let(3)
        eventually(lambda before=before: len(bench.ids(job_id)) >= before + 2)  # type: ignore[misc]
        if head_ends:
            bench.restart()
        else:
            bench.runtime.fail()
        eventually(lambda shard=shard: bench.runtime.supervisor.running and bench.runtime.shard is not shard)  # type: ignore[misc]
    bench.runtime.shard.let(1000)
    assert answer(bench, job_id) == whole


def test_questions_of_a_job_have_a_state_each(bench: Bench) -> None:
    document = bench.service.add_document("d", [b"some words " * 20], 1 << 20)
    job_id = bench.service.submit(JobSpec(JobInput(document.id, ("a?", "b?", "c?")), OPTIONS)).id
    bench.reaches(job_id, JobState.SUCCEEDED)
    for one in bench.service.get(job_id).answers:
        assert len(json.loads(one.text)["words"]) == 9


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        (Constraint("regex", "a(?=b)"), "look-around"),
        (Constraint("json_schema", '{"not": {}}'), "not at #: is not supported: say what is allowed instead"),
    ],
)
def test_refused_at_submission(bench: Bench, constraint: Constraint, problem: str) -> None:
    with pytest.raises(InvalidJob, match=problem):
        bench.submit(ask=replace(OPTIONS, structured_outputs=constraint))
    assert bench.service.counts() == (0, 0)


def test_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise CompilerBusy("others")

    monkeypatch.setattr(compiler, "try_grammar", busy)
    with pytest.raises(ServiceBusy, match="others"):
        bench.submit(ask=OPTIONS)


@pytest.mark.parametrize("form", [ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML])
def test_a_tool_that_must_be_called_is(bench: Bench, form: ToolFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRuntime, "tool_format", form)
    tools, messages = (Tool("now"), Tool("other")), (ChatMessage("user", "hi"),)
    source = JobInput(messages=messages, tools=tools, tool_choice=ToolChoice("named", "now"))
    spec = JobSpec(source, AnswerOptions(200), idempotency_key="key")
    job_id = bench.service.submit(spec).id
    assert bench.service.submit(spec).id == job_id
    bench.reaches(job_id, JobState.SUCCEEDED)
    (call,) = scan_answer(bench.service.get(job_id).answers[0].text, form, tools).calls
    assert (call.name, call.arguments, call.complete) == ("now", "{}", True)
    free = bench.service.submit(JobSpec(replace(source, tool_choice=ToolChoice()), AnswerOptions(2)))
    assert free.spec.ask.structured_outputs is None
