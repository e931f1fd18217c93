"""Requests, retries, stream positions and state files of the clients, without a connection."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster.cli.output import TokenPrinter
from cluster.client import errors, requests
from cluster.client.async_client import AsyncClient, AsyncDocuments, AsyncJob
from cluster.client.client import Client, Documents, Job
from cluster.client.connection import Connection
from cluster.client.models import JobData, JobEnded, JobView, ProgressEvent, StreamCursor, Token, TokenEvent
from cluster.config.schema import Config
from cluster.server.state_files import HeadFiles, _is_head, reachable
from protos.jobs import jobs_pb2 as pb
from tests.support.paths import ROOT

BAD: list[tuple[str | None, Any, dict[str, Any]]] = [
    (None, None, {}),
    ("text", None, {}),
    ("text", [], {}),
    (None, "Why?", {"prompt": "p"}),
    ("text", "Why?", {"prompt": "p"}),
    (None, None, {"prompt": "p", "token_ids": [1]}),
    (None, None, {"token_ids": [-1]}),
    (None, None, {"token_ids": [1 << 32]}),
    (None, None, {"token_ids": ["1"]}),
    (None, None, {"messages": [{"role": "user"}]}),
    (None, None, {"messages": [{"role": "user", "content": "c", "name": "n"}]}),
    (None, None, {"messages": ["hi"]}),
    (None, None, {"prompt": "\ud800"}),
    ("text", [1], {}),
    (None, None, {"prompt": "p", "labels": {"k": 1}}),
    (None, None, {"prompt": "p", "max_tokens": -1}),
    (None, None, {"prompt": "p", "max_tokens": 1.5}),
    (None, None, {"prompt": "p", "seed": 1 << 64}),
    (None, None, {"prompt": "p", "priority": 1 << 31}),
    (None, None, {"prompt": "p", "temperature": "hot"}),
]


@pytest.mark.parametrize(("document", "question", "options"), BAD)
def test_bad_requests_are_refused_before_they_are_sent(document: Any, question: Any, options: Any) -> None:
    with pytest.raises(cluster.InvalidRequest) as caught:
        requests.build_submit(document, question, options)
    assert isinstance(caught.value, ValueError)


def test_unknown_option_is_a_type_error() -> None:
    options: Any = {"prompt": "p", "max_token": 3}
    with pytest.raises(TypeError, match="max_token"):
        requests.build_submit(None, None, options)


def test_left_out_options_stay_unset() -> None:
    request = requests.build_submit(None, None, {"prompt": "", "temperature": None})
    assert request.WhichOneof("input") == "prompt"
    assert not request.sampling.ListFields()
    assert not request.HasField("deadline_s")
    assert len(request.idempotency_key) == 32
    assert requests.build_submit(None, None, {"token_ids": []}).WhichOneof("input") == "token_ids"


def test_backoff_grows_and_is_bounded() -> None:
    policy = errors.RetryPolicy(attempts=6, first_s=1.0, largest_s=4.0)
    for _ in range(20):
        delays = list(policy.delays())
        assert len(delays) == 5
        for delay, most in zip(delays, (1, 2, 4, 4, 4), strict=True):
            assert most / 2 <= delay <= most
    assert list(errors.RetryPolicy(attempts=1).delays()) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"address": "x"}', '{"address": "x", "pid": "y", "started": 1}', "7"])
def test_broken_state_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(cluster.Unavailable, match="longreach up"):
        errors.read_state(tmp_path)


def test_default_data_dir_is_that_of_the_configuration() -> None:
    assert Config.model_fields["data_dir"].default == errors.DEFAULT_DATA_DIR


def test_connection_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_API_KEY", "outer")
    assert Connection().secret == "outer"
    assert Connection(api_key="inner").secret == "inner"
    assert Connection(api_key="").secret == ""
    files = [{"cert_file": "c"}, {"key_file": "k"}]
    addresses = [{"address": address} for address in ("", "host", ":7", "h:x", "h:")]
    for wrong in (*files, *addresses, {"timeout_s": 0}, {"timeout_s": float("nan")}):
        values: Any = wrong
        with pytest.raises(cluster.InvalidRequest):
            Connection(**values)


KEYED = "k" * 16


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1:7777", True), ("127.1.2.3:1", True), ("localhost:1", True), ("[::1]:1", True),
        ("unix:/tmp/s", True),
        ("10.0.0.1:7777", False), ("head.example.org:1", False), ("[::]:1", False), ("0.0.0.0:1", False),
        ("localhost.example.org:1", False), ("dns:///127.0.0.1:1", False),
    ],
)  # fmt: skip
def test_a_key_travels_in_plain_text_only_on_this_machine_or_when_told(
    address: str, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Connection(address)
    Connection(address, KEYED, ca_file="ca.pem")
    Connection(address, KEYED, allow_plaintext_key=True)
    for outer in ("", KEYED):
        monkeypatch.setenv("LONGREACH_API_KEY", outer)
        if is_local:
            Connection(address, KEYED)
            continue
        with pytest.raises(cluster.InvalidRequest, match=r"plain text.*ca_file.*allow_plaintext_key=True") as caught:
            Connection(address, None if outer else KEYED)
        assert KEYED not in str(caught.value)
        with pytest.raises(cluster.InvalidRequest):
            Client(address, None if outer else KEYED)


def token(number: int) -> pb.JobEvent:
    return pb.JobEvent(number=number, token=pb.TokenEvent(token=pb.Token(token_id=number, text="x")))


def progress(processed: int) -> pb.JobEvent:
    return pb.JobEvent(progress=pb.ProgressEvent(progress=pb.Progress(total=9, processed=processed)))


def test_cursor_hands_out_each_token_once() -> None:
    cursor = StreamCursor(2)
    assert cursor.accept(token(1)) is None
    assert cursor.accept(token(2)) is None
    event = cursor.accept(token(3))
    assert isinstance(event, TokenEvent)
    assert cursor.accept(token(3)) is None
    with pytest.raises(cluster.Unavailable, match="missing"):
        cursor.accept(token(5))
    assert cursor.after == 3
    assert isinstance(cursor.accept(progress(1)), ProgressEvent)
    assert isinstance(cursor.accept(pb.JobEvent(job=pb.Job(state=pb.DECODING))), JobData)
    assert isinstance(cursor.accept(pb.JobEvent(job=pb.Job(state=pb.CANCELLED))), JobEnded)
    assert cursor.accept(pb.JobEvent()) is None


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
    policy = errors.RetryPolicy(attempts=3, first_s=0.01)
    cursor = StreamCursor(0, policy)
    for move in (token(1), progress(1), progress(2), token(2)):
        cursor.pause(gone)
        cursor.pause(gone)
        cursor.accept(move)
    for still in (progress(2), token(2)):
        cursor.pause(gone)
        cursor.accept(still)
    with pytest.raises(cluster.Unavailable):
        cursor.pause(gone)
    with pytest.raises(cluster.NotFound):
        StreamCursor(0, policy).pause(cluster.NotFound("no such job"))


def test_job_data_and_progress() -> None:
    unfinished = pb.Answer(question="b", progress=pb.Progress(total=7, processed=3, eta_ms=5))
    answers = [pb.Answer(question="a", finish_reason="stop", text="t"), unfinished]
    layer = pb.LayerAttention(layer=3, density=[0.1], fallbacks=[2])
    answers[0].attention.CopyFrom(pb.AttentionSummary(mode="sparse", scale_len=9, layers=[layer]))
    message = pb.Job(id="job_1", state=pb.PREFILLING, answers=answers, labels={"k": "v"})
    message.reproducibility.versions["torch"] = "2"
    job = JobView(JobData.read(message))
    assert (job.state, job.done) == ("prefilling", False)
    assert (job.progress.processed, job.progress.eta_ms) == (3, 5)
    assert json.loads(json.dumps(job.data.to_json()))["reproducibility"]["versions"] == {"torch": "2"}
    attention = json.loads(json.dumps(job.data.to_json()))["answers"][0]["attention"]
    assert (attention["mode"], attention["scale_len"], job.answers[1].attention) == ("sparse", 9, {})
    assert (attention["layers"][0]["density"], attention["layers"][0]["fallbacks"]) == ([0.1], [2])
    assert JobView(JobData.read(pb.Job())).progress.total == 0


def test_listing_requests() -> None:
    assert requests.list_request([], None, None).page_size == requests.PAGE_SIZE
    assert requests.list_request(["queued"], {"a": "b"}, 7) == pb.ListRequest(
        states=[pb.QUEUED], labels={"a": "b"}, page_size=7
    )
    for states, limit in ((["done"], None), ("queued", None), (["state_unspecified"], None), ([], 0)):
        with pytest.raises(cluster.InvalidRequest):
            requests.list_request(states, None, limit)


@pytest.mark.parametrize(("one", "twin"), [(Client, AsyncClient), (Job, AsyncJob), (Documents, AsyncDocuments)])
def test_async_classes_have_the_same_methods(one: type, twin: type) -> None:
    def public(kind: type) -> dict[str, list[str]]:
        members = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
        calls = {name: getattr(member, "fget", None) or member for name, member in members.items()}
        return {n: list(inspect.signature(getattr(c, "__func__", c)).parameters) for n, c in calls.items()}

    assert public(one) == public(twin)
    assert list(inspect.signature(one).parameters) == list(inspect.signature(twin).parameters)


def test_every_exported_name_is_there_and_light() -> None:
    code = (
        "import sys, cluster; [getattr(cluster, name) for name in cluster.__all__]; cluster.Client()\n"
        "print([m for m in ('ray', 'torch', 'grpc') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
    with pytest.raises(AttributeError):
        _ = cluster.Clients


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (["python", "-m", "cluster.cli", "serve", "c.yaml"], True),
        (["/venv/bin/python", "/venv/bin/longreach", "serve", "c.yaml"], True),
        (["longreach", "up", "c.yaml"], False),
        (["vim", "serve", "cluster.cli"], False),
        (["python", "-m", "http.server"], False),
        ([], False),
    ],
)
def test_command_lines_of_a_head(command: list[str], ours: bool) -> None:
    assert _is_head(command) == ours


def test_head_files(tmp_path: Path) -> None:
    files = HeadFiles(tmp_path / "new")
    assert not files.is_stale()
    files.claim()
    files.announce("[::]:77")
    assert errors.read_state(files.data_dir)["address"] == "[::1]:77"
    assert files.running() is None  # this process is no head
    assert files.is_stale()
    files.release()
    assert not list(files.data_dir.iterdir())
    assert reachable("10.0.0.1:7") == "10.0.0.1:7"


def test_token_printer(capsys: pytest.CaptureFixture[str]) -> None:
    def event(question: int, text: str) -> TokenEvent:
        return TokenEvent(question, common_token(text), 1)

    printer = TokenPrinter(2)
    for question, text in ((0, "a"), (1, "b\n\nc"), (0, "d\n"), (0, "e")):
        printer.push(event(question, text))
    printer.finish()
    assert capsys.readouterr().out == "[2] b\n[2] \n[1] ad\n[1] e\n[2] c\n"
    printer = TokenPrinter(1)
    printer.push(event(0, "a"))
    printer.finish()
    printer.finish()
    assert capsys.readouterr().out == "a\n"


def test_printer_shows_reasoning_apart(capsys: pytest.CaptureFixture[str]) -> None:
    def event(question: int, part: str, reasoning: str, answer: str) -> TokenEvent:
        token = Token(1, "<not shown>", part=part, reasoning=reasoning, answer=answer)
        return TokenEvent(question, token, 1)

    printer = TokenPrinter(1)
    for values in (("answer", "", ""), ("reasoning", "why", ""), ("reasoning", " not", ""), ("answer", "?", "so")):
        printer.push(event(0, *values))
    printer.finish()
    assert capsys.readouterr().out == "why not?\nso\n"
    printer = TokenPrinter(2)
    for question, *values in ((0, "reasoning", "a\nb", ""), (1, "answer", "", "x"), (0, "answer", "c", "d\ne")):
        printer.push(event(int(question), *map(str, values)))
    printer.finish()
    assert capsys.readouterr().out.splitlines() == ["[1 reasoning] a", "[1 reasoning] bc", "[1] d", "[1] e", "[2] x"]


def common_token(text: str) -> Any:
    return Token(1, text)
