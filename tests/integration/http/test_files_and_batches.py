"""Files and batches through OpenAI's own client, over a whole head with a fake model, and over one that is killed."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.server.head import Head
from tests.support.data.clients.batch_lines import chat
from tests.support.documents.office import pdf
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import HeadProcess, free_port, until

CHAT = "/v1/chat/completions"


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[openai.OpenAI]:
    with FakeRuntime(tmp_path, http_port=free_port(), max_batch_jobs=2) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.start()
        with client_of(head.service.http_url) as made:
            yield made
        head.close()


def begin(client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT) -> str:
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"})
    return made.id


def finish(client: openai.OpenAI, batch_id: str, status: str = "completed") -> Any:
    until(lambda: client.batches.retrieve(batch_id).status == status, f"a batch that is {status}")
    return client.batches.retrieve(batch_id)


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [*map(json.loads, client.files.content(file_id).text.splitlines())]


def test_upload_once_ask_many(client: openai.OpenAI) -> None:
    made = client.files.create(file=("report.txt", b"The code is 4711. " * 20), purpose="user_data")
    assert (made.status, made.filename, made.purpose) == ("processed", "report.txt", "user_data")
    parts: Any = [{"type": "file", "file": {"file_id": made.id}}, {"type": "text", "text": "What is the code?"}]
    usage = [
        client.chat.completions.create(
            model=client.models.list().data[0].id, max_tokens=2, messages=[{"role": "user", "content": parts}]
        ).usage
        for _ in range(2)
    ]
    assert all(one is not None and one.prompt_tokens > 100 for one in usage)
    assert [file.id for file in client.files.list(purpose="user_data", limit=1)] == [made.id]
    assert client.files.retrieve(made.id).bytes == 360
    assert client.files.content(made.id).text.startswith("The code is 4711. ")
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="must be one of user_data, batch"):
        client.files.create(file=("a", b"a"), purpose="vision")


def test_a_pdf_with_the_request_or_before_it(client: openai.OpenAI) -> None:
    data = pdf(["It was decided to leave."])
    made = client.files.create(file=("minutes.pdf", data), purpose="user_data")
    assert client.files.content(made.id).text == "[Page 1 of 1]\nIt was decided to leave.\n"
    file = {"filename": "minutes.pdf", "file_data": f"data:application/pdf;base64,{base64.b64encode(data).decode()}"}
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "file", "file": file}, {"type": "text", "text": "What?"}]},
    ]
    answer = client.chat.completions.create(model="", max_tokens=2, messages=messages)
    assert answer.choices[0].finish_reason == "length"


def test_a_batch(client: openai.OpenAI) -> None:
    lines = [chat(f"c{n}", f"question {n}") for n in range(5)] + [chat("bad", n=9)]
    batch_id = begin(client, lines)
    batch = finish(client, batch_id)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 5, 1)
    good = results(client, batch.output_file_id)
    assert [line["custom_id"] for line in good] == [f"c{n}" for n in range(5)]
    assert all(line["response"]["body"]["choices"][0]["finish_reason"] == "length" for line in good)
    (bad,) = results(client, batch.error_file_id)
    assert bad["response"]["body"]["error"]["param"] == "n"
    assert [one.id for one in client.batches.list(limit=5)] == [batch_id]
    assert {file.purpose for file in client.files.list()} == {"batch", "batch_output"}
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch_id)


def test_a_batch_of_completions_that_is_cancelled(client: openai.OpenAI) -> None:
    body = {"prompt": [5] * 60, "max_tokens": 300, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    batch_id = begin(client, [{"custom_id": str(n), **line} for n in range(200)], "/v1/completions")
    until(lambda: client.batches.retrieve(batch_id).status == "in_progress")
    assert client.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    batch = finish(client, batch_id, "cancelled")
    counts = batch.request_counts
    assert counts.failed > 0
    assert counts.completed + counts.failed == counts.total == 200
    assert {line["error"]["code"] for line in results(client, batch.error_file_id)} == {"batch_cancelled"}


def test_the_next_head_goes_on_with_a_batch(tmp_path: Path) -> None:
    port = free_port()
    body = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    lines = [chat(f"c{n}", f"The code of dark river {n} is", **body) for n in range(8)]
    server = f"  http_port: {port}\n  max_batch_jobs: 2"
    with HeadProcess(tmp_path, server=server) as head, client_of(f"http://127.0.0.1:{port}") as client:
        batch_id = begin(client, lines)
        until(lambda: client.batches.retrieve(batch_id).request_counts.completed >= 2)
        head.kill()
        head.start()
        batch = finish(client, batch_id)
        found = results(client, batch.output_file_id)
        assert [line["custom_id"] for line in found] == [f"c{n}" for n in range(8)]
        assert (batch.request_counts.completed, batch.error_file_id) == (8, None)
        with head.client() as jobs:
            made = Counter(job.labels["custom_id"] for job in jobs.jobs(labels={"batch": batch_id}))
        assert made == Counter(f"c{n}" for n in range(8))
        direct = client.post("/chat/completions", cast_to=object, body=lines[3]["body"])
        assert direct["choices"] == found[3]["response"]["body"]["choices"]  # type: ignore[index]
