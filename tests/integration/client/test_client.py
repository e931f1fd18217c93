"""The client against a service in memory over real gRPC: every input, broken connections, typed errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import cluster
from cluster import AsyncClient, Client, JobEnded, ProgressEvent, TokenEvent
from cluster.client.documents.pieces import PIECE_BYTES
from cluster.client.retry import RetryPolicy
from protos.jobs import jobs_pb2 as pb
from tests.support.fakes.server import WORDS, FakeHead

FAST = RetryPolicy(attempts=4, first_s=0.02, largest_s=0.05)
ANSWER = "".join(WORDS)
Code = grpc.StatusCode


@pytest.fixture
def client(head: FakeHead) -> Iterator[Client]:
    with Client(head.address, retries=FAST) as opened:
        yield opened


def run_async(head: FakeHead, body: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        async with AsyncClient(head.address, retries=FAST) as opened:
            await body(opened)

    asyncio.run(asyncio.wait_for(whole(), 30))


def test_every_kind_of_input(client: Client, head: FakeHead, tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("a report")
    assert client.submit("a text", "Why?").result.text == ANSWER
    assert [a.question for a in client.submit(path, ["Why?", "Who?"]).result] == ["Why?", "Who?"]
    assert len(client.submit("a text", ["Why?"]).result) == 1  # asked with a list, answered with one
    stored = client.documents.add(b"some bytes", name="bytes")
    client.submit(stored, "Why?", priority=-3, deadline_s=2.5, labels={"team": "law"}, attached=True)
    client.submit(token_ids=[1, 2, 3], max_tokens=5, temperature=0.5, seed=0, stop="x", stop_token_ids=[7])
    client.submit(messages=[{"role": "user", "content": "hi"}, ("assistant", "ho")], enable_thinking=False)
    client.submit(prompt="once", ignore_eos=True, idempotency_key="mine")
    text, file, _, document, ids, chat, prompt = head.jobs.calls["Submit"]
    assert (text.document.text, list(text.document.questions)) == ("a text", ["Why?"])
    assert file.document.document_id == client.documents.add("a report").id
    assert document.document.document_id == stored.id
    assert (document.priority, document.deadline_s, document.attached) == (-3, 2.5, True)
    assert dict(document.labels) == {"team": "law"}
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert ids.sampling.HasField("seed")
    assert not ids.sampling.HasField("top_k")
    assert (ids.sampling.max_tokens, list(ids.sampling.stop), list(ids.sampling.stop_token_ids)) == (5, ["x"], [7])
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hi"), ("assistant", "ho")]
    assert chat.sampling.HasField("enable_thinking")
    assert prompt.prompt == "once"
    assert prompt.idempotency_key == "mine"
    keys = [request.idempotency_key for request in head.jobs.calls["Submit"]]
    assert len(set(keys)) == len(keys)
    assert all(keys)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 17])
def test_uploads_in_pieces(client: Client, head: FakeHead, tmp_path: Path, size: int) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * size)
    document = client.documents.add(path)
    assert (document.name, document.size_bytes) == ("long.txt", size)
    full, rest = divmod(size, PIECE_BYTES)
    assert head.jobs.pieces == [PIECE_BYTES] * full + [rest] * (rest > 0)
    client.submit("x" * size, "Why?")
    assert bool(head.jobs.calls["Submit"][0].document.document_id) == (size > PIECE_BYTES)
    assert client.documents.get(document.id) == document
    assert client.documents.list() == [document]
    client.documents.delete(document.id)
    with pytest.raises(cluster.NotFound):
        client.documents.delete(document.id)


def test_upload_starts_again_from_the_first_piece(client: Client, head: FakeHead) -> None:
    head.jobs.failures["UploadDocument"] = [(Code.UNAVAILABLE, "gone", ())] * 2
    assert client.documents.add("x" * (PIECE_BYTES + 5)).size_bytes == PIECE_BYTES + 5
    assert len(head.jobs.calls["UploadDocument"]) == 3


@pytest.mark.parametrize("drops", [[], [0], [1], [4], [3, 2, 3], [0, 0, 2], [8]])
@pytest.mark.parametrize("how", ["drops", "ends_early"])
def test_stream_loses_and_repeats_nothing(client: Client, head: FakeHead, drops: list[int], how: str) -> None:
    setattr(head.jobs, how, list(drops))
    job = client.submit("text", "Why?")
    events = list(job.stream(retries=FAST))
    check_events(events, after=0)
    assert job.state == "succeeded"
    assert len(head.jobs.calls["Stream"]) == len(drops) + 1


def check_events(events: list[Any], after: int) -> None:
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [token.number for token in tokens] == list(range(after + 1, len(WORDS) + 1))
    assert "".join(token.token.text for token in tokens) == "".join(WORDS[after:])
    assert isinstance(events[0], ProgressEvent)
    assert events[0].progress.cached == 10
    assert [type(event) for event in events].count(JobEnded) == 1
    assert isinstance(events[-1], JobEnded)
    assert events[-1].job.answers[0].text == ANSWER


@pytest.mark.parametrize("after", [0, 1, 7, 8])
def test_stream_begins_after_a_token(client: Client, after: int) -> None:
    check_events(list(client.submit("text", "Why?").stream(after)), after)


def test_stream_survives_a_restart_of_the_head(client: Client, head: FakeHead) -> None:
    head.jobs.hold_after = 3
    job = client.submit("text", "Why?")
    events = []
    for event in job.stream():
        events.append(event)
        if isinstance(event, TokenEvent) and event.number == 3:
            head.jobs.hold_after = None
            head.restart()
    assert [e.number for e in events if isinstance(e, TokenEvent)] == list(range(1, 9))


def test_stream_gives_up_after_bounded_tries(client: Client, head: FakeHead) -> None:
    head.jobs.drops = [0] * 100
    with pytest.raises(cluster.Unavailable):
        list(client.submit("text", "Why?").stream(retries=FAST))
    # progress arrives on the first try only; from then on the policy counts
    assert FAST.attempts <= len(head.jobs.calls["Stream"]) <= FAST.attempts + 1


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED])
def test_a_stream_that_the_head_ends_goes_on(client: Client, head: FakeHead, code: grpc.StatusCode) -> None:
    head.jobs.drops = [3]
    job = client.submit("text", "Why?")
    events = job.stream()
    first = [next(events) for _ in range(2)]
    head.jobs.failures["Stream"] = [(code, "ended to make room for others", ())]
    check_events([*first, *events], 0)
    assert len(head.jobs.calls["Stream"]) == 3


def test_a_stream_that_finds_no_place_says_so_at_once(client: Client, head: FakeHead) -> None:
    job = client.submit("text", "Why?")
    head.jobs.failures["Stream"] = head.jobs.failures["Wait"] = [(Code.RESOURCE_EXHAUSTED, "full", ())] * 2
    with pytest.raises(cluster.Busy, match="full"):
        next(job.stream())
    with pytest.raises(cluster.Busy, match="full"):
        job.wait()


def test_waiting_at_a_head_that_answers_too_early_is_no_loop(
    client: Client, head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit("text", "Why?")
    monkeypatch.setattr(type(head.jobs), "_end", lambda self, job: None)
    assert not job.wait(1.2).done
    assert len(head.jobs.calls["Wait"]) <= 4


def test_a_listing_that_repeats_its_page_ends(client: Client, head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    page = pb.JobList(jobs=[pb.Job(id="job_1")], next_page_token="again")
    monkeypatch.setattr(type(head.jobs), "List", lambda self, request, context: page)
    head.restart()
    with pytest.raises(cluster.LongreachError, match="does not go on"):
        list(client.jobs())


def test_leaving_a_stream_cancels_the_call_only(client: Client, head: FakeHead) -> None:
    head.jobs.hold_after = 2
    job = client.submit("text", "Why?")
    for event in job.stream():
        if isinstance(event, TokenEvent) and event.number == 2:
            break
    assert not head.jobs.calls["Cancel"]
    head.jobs.released.set()
    assert job.wait(5).done


def test_lost_reply_of_submit_queues_once(client: Client, head: FakeHead) -> None:
    head.jobs.store_then_fail = True
    job = client.submit("text", "Why?")
    assert list(head.jobs.jobs) == [job.id]
    first, second = head.jobs.calls["Submit"]
    assert first.idempotency_key == second.idempotency_key


def test_same_key_gives_same_job_or_conflict(client: Client) -> None:
    job = client.submit("text", "Why?", idempotency_key="k")
    assert client.submit("text", "Why?", idempotency_key="k").id == job.id
    with pytest.raises(cluster.Conflict, match="idempotency_key"):
        client.submit("text", "Who?", idempotency_key="k")


ERRORS = [
    (Code.INVALID_ARGUMENT, cluster.InvalidRequest),
    (Code.NOT_FOUND, cluster.NotFound),
    (Code.ALREADY_EXISTS, cluster.Conflict),
    (Code.FAILED_PRECONDITION, cluster.Conflict),
    (Code.RESOURCE_EXHAUSTED, cluster.Busy),
    (Code.UNAUTHENTICATED, cluster.Unauthenticated),
    (Code.PERMISSION_DENIED, cluster.Unauthenticated),
    (Code.DEADLINE_EXCEEDED, cluster.Unavailable),
    (Code.INTERNAL, cluster.LongreachError),
]


@pytest.mark.parametrize(("code", "kind"), ERRORS, ids=lambda value: getattr(value, "name", ""))
def test_errors_have_types(client: Client, head: FakeHead, code: grpc.StatusCode, kind: type[Exception]) -> None:
    head.jobs.failures["Submit"] = [(code, "the\nreason", ())]
    with pytest.raises(cluster.LongreachError) as caught:
        client.submit("text", "Why?")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert len(head.jobs.calls["Submit"]) == 1  # none of these is tried again

    head.jobs.failures["Submit"] = [(code, "the reason", ())]

    async def asynchronous(other: AsyncClient) -> None:
        with pytest.raises(kind):
            await other.submit("text", "Why?")

    run_async(head, asynchronous)


@pytest.mark.parametrize(("trailing", "seconds"), [((), 1.0), ((("retry-after-ms", "2500"),), 2.5)])
def test_busy_says_when(client: Client, head: FakeHead, trailing: Any, seconds: float) -> None:
    head.jobs.failures["Submit"] = [(Code.RESOURCE_EXHAUSTED, "256 jobs are queued", trailing)]
    with pytest.raises(cluster.Busy, match="256 jobs") as caught:
        client.submit("text", "Why?")
    assert caught.value.retry_after_s == seconds


def test_no_head_is_said_soon_with_the_way_out(head: FakeHead, client: Client) -> None:
    head.stop()
    began = time.monotonic()
    with pytest.raises(cluster.Unavailable, match="longreach up"):
        client.status()
    assert time.monotonic() - began < 5


def test_api_key(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    head.jobs.api_key = "secret"
    with Client(head.address) as without, pytest.raises(cluster.Unauthenticated, match="LONGREACH_API_KEY"):
        without.status()
    with Client(head.address, "secret") as given:
        assert given.status().model == "fake"
    monkeypatch.setenv("LONGREACH_API_KEY", "secret")
    with Client(head.address) as from_environment:
        assert from_environment.status().stages[0].steps_done == 1234


def test_wait_cancel_delete(client: Client, head: FakeHead) -> None:
    head.jobs.hold_after = 0
    job = client.submit("text", "Why?")
    assert not job.wait(0.1).done
    assert job.progress.total == 100
    with pytest.raises(cluster.Conflict):
        job.delete()
    assert job.cancel().state == "cancelled"
    with pytest.raises(cluster.JobFailed) as caught:
        _ = job.result
    assert caught.value.job is job
    job.delete()
    with pytest.raises(cluster.NotFound):
        job.refresh()


def test_wait_survives_a_head_that_goes_and_comes(client: Client, head: FakeHead) -> None:
    head.jobs.failures["Wait"] = [(Code.UNAVAILABLE, "restarting", ())] * (FAST.attempts + 1)
    assert client.submit("text", "Why?").wait().state == "succeeded"


def test_failed_job(client: Client, head: FakeHead) -> None:
    head.jobs.outcome = pb.FAILED
    with pytest.raises(cluster.JobFailed, match="the pipeline broke"):
        _ = client.submit("text", "Why?").result


def test_listing_pages(client: Client, head: FakeHead) -> None:
    ids = [client.submit("text", "Why?", labels={"odd": str(i % 2)}).id for i in range(7)]
    client.job(ids[3]).cancel()
    assert [job.id for job in client.jobs()] == ids[::-1]
    assert len(head.jobs.calls["List"]) == 3  # pages of 3
    for limit in (1, 2, 3, 4, 7, 8):
        assert [job.id for job in client.jobs(limit=limit)] == ids[::-1][:limit]
    assert [job.id for job in client.jobs(states=["cancelled"])] == [ids[3]]
    assert [job.id for job in client.jobs(labels={"odd": "1"})] == [ids[5], ids[3], ids[1]]


def test_delete_whose_reply_was_lost_is_done(client: Client, head: FakeHead) -> None:
    job = client.submit("text", "Why?").wait()
    head.jobs.failures["Delete"] = [(Code.UNAVAILABLE, "gone", ())]
    del head.jobs.jobs[job.id]
    job.delete()


def test_from_state(head: FakeHead, tmp_path: Path) -> None:
    with pytest.raises(cluster.Unavailable, match="longreach up"):
        Client.from_state(tmp_path)
    (tmp_path / "head.json").write_text(f'{{"address": "{head.address}", "pid": 1, "started": 2.0}}')
    with Client.from_state(tmp_path) as client:
        assert client.status().version == "1.2.3"
