"""Jobs, answers and events as clients hand them out, and the position in a stream."""

from __future__ import annotations

import json

import pytest

import cluster
from cluster.client.models import (
    BaseJob,
    ClusterStatus,
    JobData,
    ProgressEvent,
    StageStatus,
    StreamCursor,
    Token,
    TokenEvent,
)
from cluster.client.retry import RetryPolicy
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message


def token(number: int) -> pb.JobEvent:
    return pb.JobEvent(number=number, token=pb.TokenEvent(token=pb.Token(token_id=number, text="x")))


def progress(processed: int) -> pb.JobEvent:
    return pb.JobEvent(progress=pb.ProgressEvent(progress=pb.Progress(total=9, processed=processed)))


def test_cursor_hands_out_each_token_once() -> None:
    cursor = StreamCursor(2)
    assert list(cursor.events(token(1))) == []
    assert list(cursor.events(token(2))) == []
    assert [type(event) for event in cursor.events(token(3))] == [TokenEvent]
    assert list(cursor.events(token(3))) == []
    with pytest.raises(cluster.Unavailable, match="missing"):
        list(cursor.events(token(5)))
    assert cursor.after == 3
    assert [type(event) for event in cursor.events(progress(1))] == [ProgressEvent]
    assert list(cursor.events(pb.JobEvent(job=pb.Job(state=pb.CANCELLED)))) == []
    assert list(cursor.events(pb.JobEvent())) == []


@pytest.mark.parametrize("after", range(6))
def test_a_group_of_tokens_is_its_tokens(after: int):
    cursor = StreamCursor(after)
    group = pb.JobEvent(number=5, tokens=pb.TokenGroup(tokens=[token(number).token for number in range(1, 6)]))
    events = list(cursor.events(group))
    assert [(event.number, event.token.token_id) for event in events] == [(n, n) for n in range(after + 1, 6)]
    assert list(cursor.events(group)) == []
    assert [type(event) for event in cursor.events(progress(3))] == [ProgressEvent]
    gap = pb.JobEvent(number=8, tokens=pb.TokenGroup(tokens=[token(7).token, token(8).token]))
    with pytest.raises(cluster.Unavailable, match="token 7 came after 5"):
        list(cursor.events(gap))


def test_cursor_gives_up_unless_the_stream_moves() -> None:
    gone = cluster.Unavailable("gone")
    policy = RetryPolicy(attempts=3, first_s=0.01)
    cursor = StreamCursor(0, policy)
    for move in (token(1), progress(1), progress(2), token(2)):
        cursor.pause(gone)
        cursor.pause(gone)
        list(cursor.events(move))
    for still in (progress(2), token(2)):
        cursor.pause(gone)
        list(cursor.events(still))
    with pytest.raises(cluster.Unavailable):
        cursor.pause(gone)


def test_job_data_and_progress() -> None:
    unfinished = pb.Answer(question="b", progress=pb.Progress(total=7, processed=3, eta_ms=5))
    answers = [pb.Answer(question="a", finish_reason="stop", text="t"), unfinished]
    layer = pb.LayerAttention(layer=3, density=[0.1], fallbacks=[2])
    answers[0].attention.CopyFrom(pb.AttentionSummary(mode="sparse", scale_len=9, layers=[layer]))
    message = pb.Job(id="job_1", state=pb.PREFILLING, answers=answers, labels={"k": "v"})
    message.reproducibility.versions["torch"] = "2"
    job = BaseJob(read_message(JobData, message))
    assert (job.state, job.done) == ("prefilling", False)
    assert (job.progress.processed, job.progress.eta_ms) == (3, 5)
    assert json.loads(json.dumps(job.data.to_json()))["reproducibility"]["versions"] == {"torch": "2"}
    attention = json.loads(json.dumps(job.data.to_json()))["answers"][0]["attention"]
    assert (attention["mode"], attention["scale_len"], job.answers[1].attention) == ("sparse", 9, {})
    assert (attention["layers"][0]["density"], attention["layers"][0]["fallbacks"]) == ([0.1], [2])
    assert BaseJob(read_message(JobData, pb.Job())).progress.total == 0


def test_every_field_of_a_message_arrives() -> None:
    top = [pb.TokenLogprob(token_id=5, logprob=-0.5), pb.TokenLogprob(token_id=6, logprob=-1.5)]
    message = pb.Token(token_id=5, text="o", logprob=-0.5, top=top, part=pb.REASONING, reasoning="o")
    token = Token(5, "o", -0.5, ((5, -0.5), (6, -1.5)), "reasoning", "o", "")
    assert read_message(Token, message) == token
    answer = pb.Answer(question="q", text="t", reasoning="", finish_reason="stop", token_ids=[5, 6], tokens=[message])
    timings = pb.Timings(queued_s=1.0, total_s=3.0)
    job = pb.Job(
        id="job_1", state=pb.SUCCEEDED, created=1.0, started=2.0, priority=-3, document_id="doc_1", answers=[answer],
        error="e", timings=timings, labels={"k": "v"}, last_event=2, restarts=1,
    )  # fmt: skip
    data = read_message(JobData, job)
    assert (data.id, data.state, data.created, data.started, data.finished) == ("job_1", "succeeded", 1.0, 2.0, None)
    assert (data.priority, data.document_id, data.error, data.last_event, data.restarts) == (-3, "doc_1", "e", 2, 1)
    assert (dict(data.labels), data.reproducibility) == ({"k": "v"}, {})
    seconds = {"queued_s": 1.0, "prefill_s": 0.0, "ttft_s": 0.0, "decode_s": 0.0, "total_s": 3.0}
    assert data.timings == seconds
    first = data.answers[0]
    assert (first.reasoning, first.token_ids, first.tokens, first.progress.eta_ms) == ("", (5, 6), (token,), None)
    status = pb.ClusterStatusReply(model="m", kv_usage=0.5, stages=[pb.StageStatus(rank=1, state="running")])
    assert read_message(ClusterStatus, status).stages == (StageStatus(0, 1, "running", 0, 0),)


@pytest.mark.parametrize("versions", [{}, {"torch": "2"}, {"torch": "2", "tokenizer": "none"}])
def test_texts_of_a_model_without_tokenizer_are_null(versions: dict[str, str]) -> None:
    answers = [pb.Answer(text="", token_ids=[5, 6])]
    job = pb.Job(id="j", answers=answers, reproducibility=pb.Reproducibility(model="m", versions=versions))
    data = read_message(JobData, job)
    assert data.has_text == ("tokenizer" not in versions)
    (answer,) = json.loads(json.dumps(data.to_json()))["answers"]
    assert answer["text"] == ("" if data.has_text else None)
    assert answer["token_ids"] == [5, 6]
