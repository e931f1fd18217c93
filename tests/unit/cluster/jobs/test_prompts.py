"""What is checked before texts are read, how many are read at once, and prompts that end inside the reasoning tag."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cluster.jobs import prompts as prompts_module
from cluster.jobs.model import InvalidJob, JobInput, JobSpec, ServiceBusy
from cluster.jobs.prompts import job_prompts, reasoning_opened
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.paths import NEEDLE

THINKING = "{{ messages[0]['content'] }}<assistant>{% if enable_thinking is not false %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("given", "thinking", "opened"),
    [
        (JobInput(document_id="doc_" + "0" * 32, questions=("q",)), None, True),
        (JobInput(document_id="doc_" + "0" * 32, questions=("q",)), False, False),
        (JobInput(messages=(("user", "hi"),)), None, True),
        (JobInput(messages=(("user", "hi"),)), False, False),
        (JobInput(prompt="once <think>\n"), None, True),
        (JobInput(prompt="<think> once"), None, False),
        (JobInput(token_ids=(1, 2, 3)), None, False),
    ],
)
def test_prompts_that_end_inside_the_tag(given: JobInput, thinking: bool | None, opened: bool):
    tokenizer = TextTokenizer.open(NEEDLE)
    tokenizer.chat_template = THINKING
    assert reasoning_opened(tokenizer, JobSpec(given, AnswerOptions(enable_thinking=thinking))) is opened


def test_token_ids_that_end_inside_the_tag():
    tokenizer = TextTokenizer.open(NEEDLE)
    ids = tuple(tokenizer.encode("why? <think>\n"))
    assert reasoning_opened(tokenizer, JobSpec(JobInput(token_ids=ids), AnswerOptions()))


def test_a_template_that_cannot_be_rendered_opens_nothing():
    tokenizer = TextTokenizer.open(NEEDLE)
    tokenizer.chat_template = "{{ raise_exception('no') }}<think>"
    spec = JobSpec(JobInput(messages=(("user", "hi"),)), AnswerOptions())
    assert not reasoning_opened(tokenizer, spec), "of a job that another model has answered"


class Documents:
    """One document, whose record has a size and whose content takes until `go` to be read."""

    def __init__(self, size: int, content: bytes = b"text") -> None:
        self.size, self.content = size, content
        self.reading = 0
        self.most = 0
        self.go = threading.Event()
        self.lock = threading.Lock()

    def read(self, document_id: str, check_size: Any) -> bytes:
        check_size(self.size)
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
        assert self.go.wait(10)
        with self.lock:
            self.reading -= 1
        return self.content


ASKED = JobSpec(JobInput(document_id="doc_" + "0" * 32, questions=("q",)), AnswerOptions(max_tokens=4))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> FakeRuntime:
    return FakeRuntime(tmp_path_factory.mktemp("data"))


def no_tokens(*_: object, **__: object) -> None:
    raise AssertionError("a text that cannot fit was tokenised")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (ASKED.input, "document"),
        (JobInput(prompt="a" * (64 << 20)), "prompt"),
        (JobInput(messages=(("user", "a"), ("user", "a" * (64 << 20)))), "messages"),
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


def test_few_are_read_at_once(runtime: FakeRuntime) -> None:
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
    documents.go.set()
    for thread in threads:
        thread.join(20)
    assert documents.most == at_a_time
    assert job_prompts(runtime, documents, ASKED, wait_s=0.05)
