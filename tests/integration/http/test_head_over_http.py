"""A whole head over a fake shard: what HTTP makes of real jobs, and that a retry finds what was computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.common.errors import PreflightError
from cluster.jobs.model import JobState
from cluster.server import head as head_module
from cluster.server.head import Head
from tests.support.fakes.runtime import CHUNK, FakeRuntime
from tests.support.rigs.head import free_port, until
from tests.support.rigs.http import HeadOverHttp

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HeadOverHttp]:
    made = HeadOverHttp(tmp_path)
    yield made
    made.close()


def test_chat_completions_and_tokens(served: HeadOverHttp) -> None:
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["max_model_len"] == served.runtime.max_model_len
    chat = served.post("/v1/chat/completions", **BODY).json()
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"]["completion_tokens"] == 3
    assert chat["usage"]["prompt_tokens"] == served.post("/tokenize", messages=BODY["messages"]).json()["count"]
    text = served.post("/v1/completions", prompt=[5, 6, 7], max_tokens=3).json()["choices"][0]["text"]
    assert text == served.post("/detokenize", tokens=[100, 101, 102]).json()["prompt"]
    assert "longreach_jobs_total" in httpx.get(f"{served.url}/metrics").text
    assert httpx.get(f"{served.url}/ready").status_code == 200
    assert served.head.service.status()["http_url"] == served.url


def test_a_question_about_a_stored_document(served: HeadOverHttp) -> None:
    record = served.head.service.add_document("report", [b"The code of dark river is 4711. " * 20], 1 << 20)
    parts = [{"type": "file", "file": {"file_id": record.id}}, {"type": "text", "text": "What is the code?"}]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 3}
    first, second = (served.post("/v1/chat/completions", **asked).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] > 200
    assert second["prompt_tokens_details"]["cached_tokens"] > 0
    parts[0]["file"]["file_id"] = f"file-{'0' * 32}"  # type: ignore[index]
    assert served.post("/v1/chat/completions", **asked).status_code == 404


def test_an_answer_without_a_limit_has_all_that_fits(tmp_path: Path) -> None:
    served = HeadOverHttp(tmp_path, http_max_tokens=10**6)
    try:
        size = served.runtime.max_model_len - 20
        whole = served.post("/v1/completions", prompt=[5] * size).json()
        assert (whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (20, "length")
        for body in (
            {"prompt": [5] * (size + 20)},
            {"prompt": [5] * size, "max_tokens": 21},
            {"prompt": "a b" * 10**6},
        ):
            refused = served.post("/v1/completions", **body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert refused.json()["error"]["param"] == "prompt"
        content = [{"role": "user", "content": "a b" * 10**6}]
        assert served.post("/v1/chat/completions", messages=content).json()["error"]["param"] == "messages"
    finally:
        served.close()


def test_a_retry_after_a_broken_connection_finds_what_was_computed(served: HeadOverHttp) -> None:
    prompt = [*range(3, 3 + 4 * CHUNK)]
    served.runtime.shard.hold()
    with httpx.stream("POST", f"{served.url}/v1/completions", json={"prompt": prompt, "stream": True}) as answer:
        assert answer.status_code == 200
        served.runtime.shard.let(2)  # steps: half of the prompt
        jobs = served.head.service
        until(lambda: jobs.counts()[1] == 1)
        job_id = jobs.jobs([], {}, 1, "")[0][0].id
        until(lambda: jobs.progress(job_id)[0].processed >= 2 * CHUNK)
    served.runtime.shard.let(1000)
    until(lambda: jobs.get(job_id).state is JobState.CANCELLED)
    again = served.post("/v1/completions", prompt=prompt, max_tokens=1).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2 * CHUNK - 16


def test_the_end_of_the_head_ends_streams_with_an_error(served: HeadOverHttp) -> None:
    served.runtime.shard.hold()
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=30) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        served.runtime.shard.let(1000)
        served.head.drain()
        assert httpx.get(f"{served.url}/ready").status_code == 503
        refused = served.post("/v1/chat/completions", **BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_head_without_the_packages_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "find_spec", lambda name: None)
    with FakeRuntime(tmp_path, http_port=free_port()) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        with pytest.raises(PreflightError, match=r"pip install 'longreach\[http\]'"):
            head.start()
    with FakeRuntime(tmp_path / "other") as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.start()
        head.close()
