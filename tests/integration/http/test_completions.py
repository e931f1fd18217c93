"""Several answers to a prompt, and log-probabilities of prompts, through job service and engine over a fake stage."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.access.call_pool import CallPool
from cluster.config.schema import ServerSection
from cluster.http.app import make_app
from cluster.http.core.backend import Backend
from cluster.jobs import prompts
from cluster.jobs.model import JobState
from tests.support.data.tokenizers import NEEDLE
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

TEXT = "The code of dark river is naïve 中文.<|im_end|>\n" * 5
IDS = NEEDLE.encode(TEXT)
BODY = {"messages": [{"role": "user", "content": "some words " * 60}], "n": 4, "max_tokens": 8}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, seqs=4)
    yield made
    made.close()


@pytest.fixture
def backend(bench: Bench) -> Iterator[Backend]:
    limits = ServerSection()
    made = Backend(bench.service, bench.runtime, limits, CallPool(limits.max_streams, "server.max_streams"))
    yield made
    made.close()


def ask(backend: Backend, **body: Any) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(make_app(backend, None), client=("127.0.0.1", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            asked = {"echo": True, "logprobs": 2, "temperature": 0, **body}
            return (await client.post("/v1/completions", json=asked, timeout=60)).json()

    return asyncio.run(run())


@pytest.mark.parametrize("prompt", [TEXT, IDS])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_all_tokens_have_one_but_the_first(backend: Backend, prompt: Any, most: int) -> None:
    body = ask(backend, prompt=prompt, max_tokens=most)
    (choice,) = body["choices"]
    found = choice["logprobs"]
    ids = [*IDS, *(100 + index for index in range(most))]
    assert choice["text"] == TEXT + NEEDLE.decode(ids[len(IDS) :])
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, len(ids))
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1 : len(IDS)] == [-1.0 - token / 1000 for token in IDS[1:]]
    for index in range(1, len(IDS)):
        assert found["token_logprobs"][index] in found["top_logprobs"][index].values()
        assert max(found["top_logprobs"][index].values()) == -0.5
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert "\ufffd" in token or choice["text"][offset:].startswith(token)
    assert body["usage"]["completion_tokens"] == most
    assert (body["usage"]["prompt_tokens"], choice["finish_reason"]) == (len(IDS), "length")


def test_several_prompts_share_nothing(backend: Backend) -> None:
    alone = [ask(backend, prompt=ids, max_tokens=1)["choices"][0]["logprobs"] for ids in (IDS, IDS[:40])]
    together = ask(backend, prompt=[IDS, IDS[:40], IDS], max_tokens=1)
    assert [choice["logprobs"] for choice in together["choices"]] == [*alone, alone[0]]
    assert together["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_too_long_prompts(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_SCORED_TOKENS", 20)
    error = ask(backend, prompt=IDS[:21], max_tokens=1)["error"]
    assert (error["param"], error["code"]) == ("prompt", None)
    assert error["message"] == "prompt: 21 tokens: must be at most 20 for log-probabilities of a prompt"
    assert "choices" in ask(backend, prompt=IDS[:20], max_tokens=1)


def test_the_end_of_the_pipeline(bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it all of the prompt is computed anew."""
    whole = ask(backend, prompt=IDS, max_tokens=3)["choices"]
    monkeypatch.setattr(FakeRuntime, "holds", True)
    shard = bench.runtime.shard
    shard.hold()

    async def fail() -> None:
        for steps in (1, 3):
            held = bench.runtime.shard
            held.let(steps)
            await asyncio.to_thread(eventually, lambda held=held: len(held.plans) > 1)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(bench.runtime.fail)
            await asyncio.to_thread(eventually, lambda held=held: bench.runtime.shard is not held)
        bench.runtime.shard.let(1000)

    async def run() -> Any:
        transport = httpx.ASGITransport(make_app(backend, None), client=("127.0.0.1", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            asked = {"prompt": IDS, "max_tokens": 3, "echo": True, "logprobs": 2}
            answer, _ = await asyncio.gather(client.post("/v1/completions", json=asked, timeout=60), fail())
            return answer.json()

    assert asyncio.run(run())["choices"] == whole
    assert {job.state for job in bench.service.jobs([], {}, 9, "")[0]} == {JobState.SUCCEEDED}


# --- several answers -------------------------------------------------------------------------------------------------


async def post(backend: Backend, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(backend, None), client=("127.0.0.1", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.post("/v1/chat/completions", json=BODY | body, timeout=60)


def test_the_prompt_is_computed_once(bench: Bench, backend: Backend) -> None:
    answer = asyncio.run(post(backend, seed=3)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 32
    records, _ = bench.service.jobs([], {}, 10, "")
    assert {record.reproducibility["sampling"]["seed"] for record in records} == {3, 4, 5, 6}
    prompts = {record.answers[0].prompt_tokens for record in records}
    assert prompts == {usage["prompt_tokens"]}
    computed = sum(record.answers[0].prompt_tokens - record.answers[0].cached_tokens for record in records)
    assert computed <= usage["prompt_tokens"] + 3 * 16, "of the others, the last page alone"


def test_who_leaves_cancels_all(bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.runtime.shard.hold()

    async def run() -> None:
        task = asyncio.create_task(post(backend, stream=True))
        while sum(bench.service.counts()) < 4:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    eventually(lambda: {job.state for job in bench.service.jobs([], {}, 10, "")[0]} == {JobState.CANCELLED})


def test_who_leaves_while_a_job_is_stored_ends_it(
    bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that stores it goes on when its request is gone."""
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.runtime.shard.hold()
    stored, left = threading.Event(), threading.Event()
    submit = type(bench.service).submit

    def slow(*args: Any, **kwargs: Any) -> Any:
        record = submit(*args, **kwargs)
        stored.set()
        assert left.wait(20)
        return record

    monkeypatch.setattr(type(bench.service), "submit", slow)

    async def run() -> None:
        task = asyncio.create_task(post(backend, stream=True))
        await asyncio.to_thread(stored.wait, 20)
        task.cancel()
        await asyncio.wait({task})
        left.set()

    asyncio.run(run())
    eventually(lambda: [job.state for job in bench.service.jobs([], {}, 10, "")[0]] == [JobState.CANCELLED])
