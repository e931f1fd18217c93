"""Bad arguments of the client and the job verbs, against a whole head in this process over a fake pipeline.

Every one is refused in one line that names what is wrong, its value and what is allowed; the head goes on.
"""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cluster
from cluster import Client
from cluster.cli.main import main
from protos.jobs.limits import MAX_DEADLINE_S, MAX_QUESTIONS, MAX_REQUEST_BYTES
from protos.stage.channel import CHANNEL_OPTIONS
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import Served

NAN, INF = float("nan"), float("inf")
UNKNOWN_JOB, UNKNOWN_DOC = "job_" + "1f" * 16, "doc_" + "1f" * 16
TRAVERSAL = ["../../etc/passwd", "job_../../x", "doc_" + "0" * 31 + "/", "..", "/etc/passwd", "job_" + "0" * 31 + "\0"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("head")
    runtime = FakeRuntime(folder / "runtime")
    runtime.start()
    with Served(runtime, folder / "data", max_document_bytes=8 << 20) as served:
        yield served
    runtime.close()


def refusal(call: Callable[[], object], kind: type[Exception] = cluster.InvalidRequest) -> str:
    with pytest.raises(cluster.LongreachError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


# options of a submission, and the beginning of what is said
SUBMIT: list[tuple[dict[str, Any], str]] = [
    ({}, "input: must be exactly one of document"),
    ({"prompt": "a", "token_ids": [1]}, "input: must be exactly one of"),
    ({"question": "q", "prompt": "a"}, "question: goes with a document"),
    ({"document": "d"}, "question: goes with a document"),
    ({"document": "d", "question": []}, "question: 0: must be at least one"),
    ({"document": "d", "question": ["a", " \n"]}, r"question[1]: ' \n': must not be empty"),
    ({"document": "d", "question": ""}, "question[0]: '': must not be empty"),
    ({"document": "d", "question": ["q"] * (MAX_QUESTIONS + 1)}, "question: 1025: must be at most 1024"),
    ({"document": "d", "question": [1]}, "question[0]: 1: must be text"),
    ({"document": "d", "question": 5}, "question: 5: must be a list of texts"),
    ({"document": b"d", "question": "q"}, "document: b'd': must be text, a path object, a list of them, or an"),
    ({"document": "", "question": "q"}, "document.text: empty: must have at least one"),
    ({"document": " \n", "question": "q"}, "document: 2 bytes of white space: must have text"),
    ({"document": "\ud800", "question": "q"}, r"document: character '\ud800' at 0: must be text that UTF-8 can hold"),
    ({"document": Path("/nowhere/x"), "question": "q"}, "/nowhere/x: cannot be read"),
    ({"document": Path("a\0b"), "question": "q"}, r"a\x00b: cannot be read"),
    ({"prompt": ""}, "prompt: empty: must have at least one"),
    ({"prompt": 5}, "prompt: 5: must be text"),
    ({"token_ids": []}, "token_ids: empty: must have at least one"),
    ({"token_ids": "12"}, "token_ids: '12': must be a list of whole numbers"),
    ({"token_ids": [1, -1]}, "token_ids[1]: -1: must be a whole number from 0 to 4294967295"),
    ({"token_ids": [1 << 40]}, "token_ids[0]: 1099511627776: must be a whole number from 0 to 4294967295"),
    ({"token_ids": [1 << 31]}, "token_ids: 2147483648 at index 0: must be between 0 and"),
    ({"token_ids": [1.5]}, "token_ids[0]: 1.5: must be a whole number"),
    ({"token_ids": 7}, "token_ids: 7: must be a list"),
    ({"messages": []}, "messages: []: must be a list of at least one message"),
    ({"messages": ["hi"]}, "messages[0]: 'hi': must have role and content"),
    ({"messages": [("user", "a"), {"role": "user"}]}, "messages[1]: {'role': 'user'}: must have role and content"),
    ({"messages": [("king", "a")]}, "messages[0].role: 'king': must be one of system, user, assistant, tool"),
    ({"messages": [("user", 3)]}, "messages[0].content: 3: must be text"),
    ({"max_tokens": -1}, "max_tokens: -1: must be a whole number from 1 to 4294967295"),
    ({"max_tokens": 0}, "max_tokens: 0: must be a whole number from 1 to 4294967295"),
    ({"max_tokens": 1 << 32}, "max_tokens: 4294967296: must be a whole number from 1 to"),
    ({"max_tokens": 10**5000}, "max_tokens: (int): must be a whole number from 1 to"),
    ({"max_tokens": 4_000_000}, "prompt: 1 tokens + max_tokens 4000000"),
    ({"max_tokens": 1.5}, "max_tokens: 1.5: must be a whole number"),
    ({"max_tokens": True}, "max_tokens: True: must be a whole number"),
    ({"max_tokens": "9"}, "max_tokens: '9': must be a whole number"),
    ({"temperature": -1}, "temperature: -1: must be a number from 0 to 100"),
    ({"temperature": NAN}, "temperature: nan: must be a number from 0 to 100"),
    ({"temperature": INF}, "temperature: inf: must be a number from 0 to 100"),
    ({"temperature": "hot"}, "temperature: 'hot': must be a number from 0 to 100"),
    ({"top_k": -1}, "top_k: -1: must be a whole number from 0 to 1073741824"),
    ({"top_p": 0}, "top_p: 0: must be above 0 and at most 1"),
    ({"top_p": 1.1}, "top_p: 1.1: must be a number from 0 to 1"),
    ({"min_p": -0.1}, "min_p: -0.1: must be a number from 0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty: 0"),
    ({"seed": -5}, "seed: -5: must be a whole number from 0 to 9223372036854775807"),
    ({"seed": 1 << 63}, "seed: 9223372036854775808: must be"),
    ({"logprobs": -1}, "logprobs: -1: must be a whole number from 0 to 100"),
    ({"logprobs": 101}, "logprobs: 101: must be a whole number from 0 to 100"),
    ({"stop": [""]}, "stop[0]: 0 characters: must have at least 1"),
    ({"stop": ["a"] * 65}, "stop: 65: must be at most 64"),
    ({"stop": 5}, "stop: 5: must be a list of texts"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]: -1: must be a whole number"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids: 65: must be at most 64"),
    ({"stop_token_ids": [1 << 31]}, "stop_token_ids: 2147483648 at index 0: must be between 0 and"),
    ({"ignore_eos": 1}, "ignore_eos: 1: must be True or False"),
    ({"enable_thinking": "no"}, "enable_thinking: 'no': must be True or False"),
    ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml: unknown: must be one of json, json_object, regex,"),
    ({"attached": None}, "attached: None: must be True or False"),
    ({"priority": 1 << 31}, "priority: 2147483648: must be a whole number from -2147483648 to 2147483647"),
    ({"priority": "high"}, "priority: 'high': must be a whole number"),
    ({"deadline_s": 0}, "deadline_s: 0: must be a number above 0 and at most 2.592e+06"),
    ({"deadline_s": -3.5}, "deadline_s: -3.5: must be a number above 0"),
    ({"deadline_s": NAN}, "deadline_s: nan: must be a number above 0"),
    ({"deadline_s": MAX_DEADLINE_S + 1}, "deadline_s: 2592001.0: must be a number above 0"),
    ({"idempotency_key": "k" * 257}, "idempotency_key: 257 characters: must have 0 to 256"),
    ({"idempotency_key": 5}, "idempotency_key: 5: must be text"),
    ({"labels": ["a"]}, "labels: ['a']: must be a mapping of text to text"),
    ({"labels": {"": "x"}}, "labels: 0 characters: must have 1 to 256"),
    ({"labels": {"a": 1}}, "labels.'a': 1: must be text"),
    ({"labels": {str(i): "" for i in range(33)}}, "labels: 33: must be at most 32"),
    ({"labels": {"a": "x" * 257}}, "labels.'a': 257 characters: must have 0 to 256"),
]


@pytest.mark.parametrize(("options", "said"), SUBMIT, ids=range(len(SUBMIT)))
def test_bad_submissions(head: Served, options: dict[str, Any], said: str) -> None:
    if options and not options.keys() & {"prompt", "token_ids", "messages", "document", "question"}:
        options = {"token_ids": [1]} | options
    before = head.store.count()
    message = refusal(lambda: head.client.submit(**options))
    assert message.startswith(said), message
    assert head.store.count() == before


def test_an_unknown_document(head: Served) -> None:
    gone = head.client.documents.add("soon gone")
    head.client.documents.delete(gone.id)
    message = refusal(lambda: head.client.submit(gone, "q"), cluster.NotFound)
    assert gone.id in message


CALLS: list[tuple[Callable[[Client], object], type[Exception], str]] = [
    (lambda c: c.job(UNKNOWN_JOB), cluster.NotFound, f"job {UNKNOWN_JOB}: not found (it may have expired)"),
    (lambda c: c.documents.get(UNKNOWN_DOC), cluster.NotFound, f"document: {UNKNOWN_DOC}: not found"),
    (lambda c: c.documents.delete(UNKNOWN_DOC), cluster.NotFound, f"document: {UNKNOWN_DOC}: not found"),
    (lambda c: c.job(5), cluster.InvalidRequest, "job id: 5: must be text"),  # type: ignore[arg-type]
    (lambda c: c.job("\ud800"), cluster.InvalidRequest, "job id: character"),
    (lambda c: c.job("j" * 300), cluster.InvalidRequest, "job id: 300 characters: must have 0 to 256"),
    (lambda c: c.documents.get(UNKNOWN_JOB), cluster.InvalidRequest, "doc id: 'job_"),
    (lambda c: c.job(UNKNOWN_DOC), cluster.InvalidRequest, "job id: 'doc_"),
    (lambda c: c.documents.add(5), cluster.InvalidRequest, "document: 5: must be text, bytes or a path"),  # type: ignore[arg-type]
    (
        lambda c: c.documents.add("x", name="n" * 257),
        cluster.InvalidRequest,
        "name: 257 characters: must have 0 to 256",
    ),
    (lambda c: c.documents.add("x", name=5), cluster.InvalidRequest, "name: 5: must be text"),  # type: ignore[arg-type]
    (lambda c: c.submit(c.documents.add(b"\xff"), "q"), cluster.InvalidRequest, "document: byte 0xff at offset 0"),
    (lambda c: c.documents.add(b""), cluster.InvalidRequest, "document: 0 bytes"),
    (lambda c: list(c.jobs(limit=0)), cluster.InvalidRequest, "limit: 0: must be a whole number from 1 to"),
    (lambda c: list(c.jobs(limit=-1)), cluster.InvalidRequest, "limit: -1: must be a whole number from 1 to"),
    (lambda c: list(c.jobs(limit="9")), cluster.InvalidRequest, "limit: '9': must be"),  # type: ignore[arg-type]
    (lambda c: list(c.jobs(["done"])), cluster.InvalidRequest, "states: 'done': must be a list of queued, "),
    (lambda c: list(c.jobs("queued")), cluster.InvalidRequest, "states: 'queued': must be a list"),
    (lambda c: list(c.jobs(labels={"a": 1})), cluster.InvalidRequest, "labels.'a': 1: must be text"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("call", "kind", "said"), CALLS, ids=range(len(CALLS)))
def test_bad_calls(head: Served, call: Callable[[Client], object], kind: type[Exception], said: str) -> None:
    message = refusal(lambda: call(head.client), kind)
    assert message.startswith(said), message


@pytest.mark.parametrize("wrong", TRAVERSAL)
def test_ids_are_no_paths(head: Served, wrong: str) -> None:
    for call in (head.client.job, head.client.documents.get, head.client.documents.delete):
        assert "must be" in refusal(lambda call=call: call(wrong))  # type: ignore[misc]


def test_bad_arguments_of_a_job(head: Served) -> None:
    job = head.client.submit(token_ids=[1, 2, 3], max_tokens=2).wait(60)
    assert job.state == "succeeded"
    for timeout, shown in ((-1, "-1"), (NAN, "nan"), ("soon", "'soon'"), (True, "True")):
        assert refusal(lambda t=timeout: job.wait(t)).startswith(f"timeout_s: {shown}: must be a number from 0 to")  # type: ignore[misc]
    for after, shown in ((-1, "-1"), (1.5, "1.5"), (1 << 63, str(1 << 63))):
        message = refusal(lambda a=after: list(job.stream(a)))  # type: ignore[misc]
        assert message.startswith(f"after: {shown}: must be a whole number from 0 to")
    assert refusal(lambda: list(job.stream(3))).startswith("after: 3: must be between 0 and 2, the newest token")
    assert job.cancel().state == job.cancel().state == "succeeded"  # one that has ended stays as it is
    job.delete()
    for call in (job.refresh, job.cancel, job.delete, lambda: list(job.stream())):
        assert job.id in refusal(call, cluster.NotFound)


def test_cancel_twice_and_delete_while_it_runs(head: Served) -> None:
    shard = head.runtime.shard  # type: ignore[attr-defined]
    shard.hold()
    try:
        job = head.client.submit(token_ids=[1] * 8, max_tokens=50)
        assert "still runs: cancel it first" in refusal(job.delete, cluster.Conflict)
        later = threading.Timer(0.2, shard.let, (10_000,))  # a step that is under way is not interrupted
        later.start()
        assert job.cancel().state == "cancelled"
        assert job.cancel().state == "cancelled"
        later.join()
    finally:
        shard.let(10_000)
    job.delete()


def test_a_deadline_that_expires(head: Served) -> None:
    shard = head.runtime.shard  # type: ignore[attr-defined]
    shard.hold()
    try:
        job = head.client.submit(token_ids=[1] * 8, max_tokens=50, deadline_s=0.3)
        with pytest.raises(cluster.JobFailed, match="deadline exceeded"):
            _ = job.result
    finally:
        shard.let(10_000)


def test_a_gigabyte(head: Served, tmp_path: Path) -> None:
    """As a file it is refused while it travels, as one message before; neither fills the memory."""
    assert ("grpc.max_receive_message_length", MAX_REQUEST_BYTES) in CHANNEL_OPTIONS
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    began = time.monotonic()
    message = refusal(lambda: head.client.submit(huge, "q"))
    assert message.startswith(f"{huge}: 1073741824 bytes: must be at most "), message
    done = CliRunner().invoke(main, ["submit", "--prompt-file", str(huge), "--address", head.address])
    assert done.exit_code == 2
    assert done.output.startswith(f"longreach: error: {huge}: 1073741824 bytes: must be at most 67108864")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 20
    assert peak < 300 << 20
    message = refusal(lambda: head.client.submit(prompt="x" * ((64 << 20) + 1)))
    assert message.startswith("prompt: 6710"), message
    assert "send long texts as a document" in message


CLI = [
    (["submit", "--prompt-file", "FILE", "--max-tokens", "-1"], 2, "--max-tokens': '-1': must be a whole number such"),
    (["submit", "--prompt-file", "FILE", "--max-tokens", "0"], 2, "max_tokens: 0: must be a whole number from 1 to"),
    (["submit", "--prompt-file", "FILE", "--temperature", "nan"], 2, "temperature: nan: must be a number from"),
    (["submit", "--prompt-file", "FILE", "--temperature", "hot"], 2, "--temperature': 'hot' is not a valid float"),
    (["submit", "--prompt-file", "FILE", "--seed", "-1"], 2, "seed: -1: must be a whole number from 0"),
    (["submit", "--prompt-file", "FILE", "--deadline", "-1"], 2, "deadline_s: -1.0: must be a number above 0"),
    (["submit", "--prompt-file", "FILE", "--label", "x"], 2, "--label: 'x': must be KEY=VALUE"),
    (["submit", "--prompt-file", "/dev/zero"], 2, "/dev/zero: 67108865 bytes: must be at most"),
    (["submit", "--prompt-file", "FILE", "--question", "q"], 2, "question: goes with a document"),
    (["submit", "--document", "FILE", "--question", " "], 2, "question[0]: ' ': must not be empty"),
    (["submit", "--document", "FILE"], 2, "question: goes with a document"),
    (["submit", "--nonsense"], 2, "No such option '--nonsense'"),
    (["submit"], 2, "input: must be exactly one of"),
    (["wait"], 2, "Missing argument 'ID'"),
    (["wait", UNKNOWN_JOB], 4, f"job {UNKNOWN_JOB}: not found"),
    (["wait", UNKNOWN_JOB, "--timeout", "-1"], 2, "--timeout': -1.0 is not in the range x>=0"),
    (["wait", "../../etc/passwd"], 2, "job id: '../../etc/passwd': must be job_ and 32 hexadecimal digits"),
    (["stream", UNKNOWN_JOB, "--after", "-1"], 2, "--after': -1 is not in the range x>=0"),
    (["stream", UNKNOWN_JOB], 4, f"job {UNKNOWN_JOB}: not found"),
    (["cancel", UNKNOWN_JOB], 4, f"job {UNKNOWN_JOB}: not found"),
    (["cancel", "x\ny"], 2, r"job id: 'x\ny': must be job_"),
    (["cancel"], 2, "Missing argument"),
    (["jobs", "--limit", "-1"], 2, "--limit': -1 is not in the range x>=1"),
    (["jobs", "--state", "done"], 2, "--state': 'done' is not one of 'queued'"),
    (["docs", "rm", "../x"], 2, "doc id: '../x': must be doc_ and 32 hexadecimal digits"),
    (["docs", "rm", UNKNOWN_DOC], 4, UNKNOWN_DOC),
    (["docs", "rm"], 2, "Missing argument 'ID...'"),
    (["docs", "add", "/nowhere/x"], 2, "/nowhere/x: cannot be read"),
    (["docs", "drop"], 2, "No such command 'drop'"),
    (["status", "--address", "nonsense"], 2, "address: 'nonsense': must be HOST:PORT such as 127.0.0.1:7777"),
    (["status", "--address", "127.0.0.1:99999"], 2, "address: '127.0.0.1:99999': must be HOST:PORT"),
    (["status", "--cert-file", "FILE"], 2, "key_file: (missing): goes with"),
    (["nonsense"], 2, "No such command 'nonsense'"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), CLI, ids=[" ".join(a[:3])[:40] for a, *_ in CLI])
def test_bad_command_lines(
    head: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.setenv("LONGREACH_ADDRESS", head.address)
    file = tmp_path / "prompt.txt"
    file.write_text("once")
    done = CliRunner().invoke(main, [str(file) if word == "FILE" else word for word in arguments])
    assert done.exit_code == code, done.output
    assert done.output.startswith("longreach: error: "), done.output
    assert done.output.count("\n") == 1, done.output
    assert said in done.output


def test_the_head_lives_on(head: Served) -> None:
    assert head.client.submit(token_ids=[1, 2], max_tokens=2).wait(60).state == "succeeded"
