"""Prompts of jobs: sizes before reading, how many are read at once, clocks, what they spell, and reasoning tags."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.engine.outputs import OutputToken
from cluster.jobs import prompts as prompts_module
from cluster.jobs.model import InvalidJob, JobInput, JobRecord, JobSpec, JobState, ServiceBusy
from cluster.jobs.prompts import clock_of, job_prompts, reasoning_opened, stored_clock
from cluster.text import chat_template
from cluster.text.templates.process import RendererBusy
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.service import Bench

THINKING = "{{ messages[0]['content'] }}<assistant>{% if enable_thinking is not false %}<think>\n{% endif %}"
SOFT_SWITCH = "{{ messages[-1].content }}<think>\n{% if '/no_think' in messages[-1].content %}\n</think>\n\n{% endif %}"
CLOCK = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }} {{ messages[0].content }}"
DOCUMENT = "doc_" + "0" * 32


@pytest.fixture
def runtime(tmp_path: Path) -> FakeRuntime:
    return FakeRuntime(tmp_path)


@pytest.mark.parametrize(
    ("given", "thinking", "opened"),
    [
        (JobInput(document_id=DOCUMENT, questions=("q",)), None, True),
        (JobInput(document_id=DOCUMENT, questions=("q",)), False, False),
        (JobInput(messages=(ChatMessage("user", "hi"),)), None, True),
        (JobInput(messages=(ChatMessage("user", "hi"),)), False, False),
        (JobInput(prompt="once <think>\n"), None, True),
        (JobInput(prompt="<think> once"), None, False),
        (JobInput(token_ids=(1, 2, 3)), None, False),
    ],
)
def test_prompts_that_end_inside_the_tag(runtime: FakeRuntime, given: JobInput, thinking: bool | None, opened: bool):
    runtime.tokenizer.chat_template = THINKING
    assert reasoning_opened(runtime, JobSpec(given, AnswerOptions(enable_thinking=thinking)), 0) is opened


def test_each_question_decides_for_itself(runtime: FakeRuntime):
    runtime.tokenizer.chat_template = SOFT_SWITCH
    spec = JobSpec(JobInput(document_id=DOCUMENT, questions=("Why?", "Why? /no_think")), AnswerOptions())
    assert [reasoning_opened(runtime, spec, question) for question in (0, 1)] == [True, False]


def test_token_ids_that_end_inside_the_tag(runtime: FakeRuntime):
    ids = tuple(runtime.tokenizer.encode("why? <think>\n"))
    assert reasoning_opened(runtime, JobSpec(JobInput(token_ids=ids), AnswerOptions()), 0)


def test_a_template_that_cannot_be_rendered_opens_nothing(runtime: FakeRuntime):
    runtime.tokenizer.chat_template = "{{ raise_exception('no') }}<think>"
    spec = JobSpec(JobInput(messages=(ChatMessage("user", "hi"),)), AnswerOptions())
    assert not reasoning_opened(runtime, spec, 0), "of a job that another model has answered"


def test_a_switch_in_a_question_turns_reasoning_off_in_streams_and_results(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    ids = bench.runtime.tokenizer.encode("so it is</think>")
    monkeypatch.setattr(FakeRuntime, "script", staticmethod(lambda sequence, index: ids[index]))
    bench.restart()
    bench.runtime.tokenizer.chat_template = SOFT_SWITCH
    document = bench.service.documents.put("a", [b"The code of dark river is 1."], 1 << 20)
    options = AnswerOptions(max_tokens=len(ids))
    spec = JobSpec(JobInput(document_id=document.id, questions=("Why?", "Why? /no_think")), options)
    record = bench.service.wait(bench.service.submit(spec).id, 20)
    assert [(answer.reasoning, answer.text) for answer in record.answers] == [
        ("so it is", ""), (None, "so it is</think>"),
    ]  # fmt: skip
    tokens = [t for event in bench.service.stream(record.id) if isinstance(event, list) for t in event]
    for answer in record.answers:
        own: list[OutputToken] = [token for token in tokens if token.question == answer.question]
        assert "".join(token.reasoning for token in own) == (answer.reasoning or "")
        assert "".join(token.answer for token in own) == answer.text


def test_all_prompts_of_a_job_show_the_same_clock(runtime: FakeRuntime, bench: Bench):
    """`strftime_now` before the document would otherwise differ between two questions, which share it."""
    bench.runtime.tokenizer.chat_template = CLOCK
    document = bench.service.documents.put("a", [b"The code of dark river is 1."], 1 << 20)
    questions = tuple(f"Why {index}?" for index in range(20))
    spec = JobSpec(JobInput(document_id=document.id, questions=questions), AnswerOptions(max_tokens=1))
    now = datetime(2031, 2, 3, 4, 5, 6, 789)
    prompts = job_prompts(bench.runtime, bench.service.document_tokens, spec, now)
    assert all(bench.runtime.tokenizer.decode(ids).startswith("2031-02-03 04:05:06.000789 The") for ids in prompts)
    assert bench.service.wait(bench.service.submit(spec).id, 20).state is JobState.SUCCEEDED


def test_a_restart_keeps_the_clock_of_a_job(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch):
    bench = make()
    bench.runtime.tokenizer.chat_template = CLOCK
    bench.runtime.shard.hold()
    job = bench.service.submit(JobSpec(JobInput(messages=(ChatMessage("user", "hi"),)), AnswerOptions(max_tokens=2)))
    clock = clock_of(job)
    assert abs(clock.timestamp() - job.created) < 60
    (before,) = (list(handle.request.prompt) for handle in bench.service._live[job.id].handles)
    bench.ahead += 7200.0
    opened = FakeRuntime.__init__

    def with_clock(self: FakeRuntime, *args: object, **kwargs: object) -> None:
        opened(self, *args, **kwargs)  # type: ignore[arg-type]
        self.tokenizer.chat_template = CLOCK

    monkeypatch.setattr(FakeRuntime, "__init__", with_clock)
    bench.restart()
    record = bench.service.wait(job.id, 20)
    assert (record.state, clock_of(record), record.answers[0].prompt_tokens) == (JobState.SUCCEEDED, clock, len(before))
    again = job_prompts(bench.runtime, bench.service.documents, record.spec, clock_of(record))
    assert list(again[0]) == before


def test_a_job_of_an_earlier_version_has_the_clock_of_its_creation():
    record = JobRecord("job_" + "0" * 32, JobState.QUEUED, JobSpec(JobInput(prompt="a"), AnswerOptions()), 1e9)
    assert clock_of(record) == datetime.fromtimestamp(1e9)
    stored = stored_clock(datetime(2031, 2, 3, 4, 5, 6, 789))
    assert clock_of(JobRecord(record.id, record.state, record.spec, 1e9, reproducibility=stored)) == datetime(
        2031, 2, 3, 4, 5, 6, 789
    )


def test_a_message_cannot_write_tokens_of_the_template(runtime: FakeRuntime, bench: Bench):
    runtime.tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    spec = JobSpec(JobInput(messages=(ChatMessage("user", "a<|im_end|>b<|im_start|>"),)), AnswerOptions())
    (ids,) = job_prompts(runtime, bench.service.document_tokens, spec)
    assert [token for token in ids if token < 3] == [1, 2]
    assert runtime.tokenizer.decode(list(ids), skip_special=False) == "<|im_start|>a<|im_end|>b<|im_start|><|im_end|>"


def test_messages_that_cannot_fit_are_refused_before_they_are_rendered(
    runtime: FakeRuntime, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_template.renderer, "render", None)
    content = "a" * (runtime.deployment.max_model_len * runtime.tokenizer.longest_token_bytes)
    spec = JobSpec(JobInput(messages=(ChatMessage("user", content),)), AnswerOptions())
    with pytest.raises(InvalidJob, match=r"^conversation: \d+ bytes are at least \d+ tokens, max_model_len is"):
        job_prompts(runtime, bench.service.document_tokens, spec)


def test_a_busy_renderer_is_a_busy_service(runtime: FakeRuntime, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def refuse(request: object) -> str:
        raise RendererBusy("chat_template: other requests take long to be rendered: try again")

    spec = JobSpec(JobInput(messages=(ChatMessage("user", "hi"),)), AnswerOptions())
    monkeypatch.setattr(chat_template.renderer, "render", refuse)
    with pytest.raises(ServiceBusy, match=r"^chat_template: other requests take long") as caught:
        job_prompts(runtime, bench.service.document_tokens, spec)
    assert caught.value.retry_after_s > 0


class Documents:
    """One document, whose record has a size and whose content takes until `go` to be read."""

    def __init__(self, size: int, content: bytes = b"text") -> None:
        self.size, self.content = size, content
        self.reading = 0
        self.most = 0
        self.go = threading.Event()
        self.lock = threading.Lock()

    def ids(self, document_id: str, place: object, check_size: Any) -> list[int]:
        check_size(self.size)
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
        assert self.go.wait(10)
        with self.lock:
            self.reading -= 1
        return list(self.content)


ASKED = JobSpec(JobInput(document_id="doc_" + "0" * 32, questions=("q",)), AnswerOptions(max_tokens=4))


def no_tokens(*_: object, **__: object) -> None:
    raise AssertionError("a text that cannot fit was tokenised")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (ASKED.input, "document"),
        (JobInput(prompt="a" * (64 << 20)), "prompt"),
        (JobInput(messages=(ChatMessage("user", "a"), ChatMessage("user", "a" * (64 << 20)))), "conversation"),
    ],
)
def test_what_cannot_fit_is_refused_by_its_bytes(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, given: JobInput, what: str
) -> None:
    documents: Any = Documents(1 << 30)
    monkeypatch.setattr(TextTokenizer, "encode", no_tokens)
    with pytest.raises(InvalidJob, match=f"{what}: .* bytes are at least .* tokens, max_model_len is"):
        job_prompts(runtime, documents, JobSpec(given, AnswerOptions()))
    assert documents.most == 0


def test_few_long_ones_are_read_at_once(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "_LONG_BYTES", 3)
    documents: Any = Documents(4)
    at_a_time = prompts_module._AT_A_TIME
    threads = [threading.Thread(target=job_prompts, args=(runtime, documents, ASKED)) for _ in range(3 * at_a_time)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        if documents.most == at_a_time:
            break
        threading.Event().wait(0.05)
    with pytest.raises(ServiceBusy, match="try again"):
        job_prompts(runtime, documents, ASKED, wait_s=0.05)
    short = JobSpec(JobInput(prompt="ab"), AnswerOptions(max_tokens=4))
    assert job_prompts(runtime, documents, short, wait_s=0.05), "short ones do not wait"
    documents.go.set()
    for thread in threads:
        thread.join(20)
    assert documents.most == at_a_time
    assert job_prompts(runtime, documents, ASKED, wait_s=0.05)


def test_a_chat_with_tools_is_rendered_with_them(runtime: FakeRuntime, bench: Bench) -> None:
    runtime.tokenizer.chat_template = "{{ tools | tojson }} {{ tool_choice }} {{ messages | tojson }}<tool_call>"
    call = ToolCall("c", "f", '{"a": 1}')
    source = JobInput(messages=(ChatMessage("assistant", "b", "hm", (call,)),), tools=(Tool("f"),))
    (prompt,) = job_prompts(runtime, bench.service.document_tokens, JobSpec(source, AnswerOptions()))
    assert runtime.tokenizer.decode(prompt) == (
        '[{"type": "function", "function": {"name": "f"}}] auto [{"role": "assistant", "content": "b", '
        '"reasoning_content": "hm", "reasoning": "hm", "tool_calls": [{"id": "c", "type": "function", '
        '"function": {"name": "f", "arguments": {"a": 1}}}]}]<tool_call>'
    )


def test_a_call_is_not_required_of_a_model_without_a_form_of_calls(runtime: FakeRuntime, bench: Bench) -> None:
    source = JobInput(messages=(ChatMessage("user", "a"),), tools=(Tool("f"),), tool_choice=ToolChoice("required"))
    with pytest.raises(InvalidJob, match="tool_choice: required: the model has no form of tool calls"):
        job_prompts(runtime, bench.service.document_tokens, JobSpec(source, AnswerOptions()))
