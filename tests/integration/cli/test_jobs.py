"""The job verbs as a user runs them, against a service in memory: output, `--json`, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import grpc
import pytest

from protos.jobs import jobs_pb2 as pb
from tests.integration.conftest import CommandLine, read_at_least
from tests.support.fakes.server import WORDS, FakeHead

ANSWER = "".join(WORDS).strip()
UNKNOWN = "job_" + "f" * 32


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.txt"
    path.write_text("a report")
    return path


def test_submit_then_wait_and_list(verb: CommandLine, head: FakeHead, report: Path) -> None:
    done = verb("submit", "--document", report, "--question", "Why?", "--label", "team=law", "--max-tokens", "1k")
    assert (done.code, done.err) == (0, "")
    job_id = done.out.strip()
    request = head.jobs.calls["Submit"][0]
    assert request.sampling.max_tokens == 1000
    assert dict(request.labels) == {"team": "law"}
    said = {item.name for item, _ in request.sampling.ListFields()}
    assert said == {"max_tokens"}, "what is not said is the model's to decide"
    verb("submit", "--document", report, "--question", "Why?", "--temperature", "0", "--top-k", "0", "--seed", "0")
    said = {item.name: value for item, value in head.jobs.calls["Submit"][1].sampling.ListFields()}
    assert said == {"max_tokens": 256, "temperature": 0.0, "top_k": 0, "seed": 0}

    done = verb("wait", job_id)
    assert (done.code, done.out.strip()) == (0, ANSWER)
    done = verb("wait", job_id, "--json")
    assert json.loads(done.out)["answers"][0]["text"].strip() == ANSWER

    done = verb("jobs")
    assert job_id in done.out
    assert "team=law" in done.out
    assert [job["state"] for job in json.loads(verb("jobs", "--state", "succeeded", "--json").out)] == ["succeeded"]
    assert json.loads(verb("jobs", "--label", "team=tax", "--json").out) == []


def test_inputs_that_cannot_be_used(verb: CommandLine, head: FakeHead, tmp_path: Path, report: Path) -> None:
    bad = tmp_path / "ids.json"
    bad.write_text('{"no": "list"}')
    question = ("--question", "Why?")
    for arguments in (
        ["submit"],
        ["submit", "--document", tmp_path / "missing.txt", *question],
        ["submit", "--document", report],
        ["submit", "--document", report, "--prompt-file", report, *question],
        ["submit", "--token-ids", bad],
        ["submit", "--prompt-file", report, "--label", "no equals sign"],
        ["docs", "add"],
    ):
        done = verb(*arguments)
        assert done.code == 2, arguments
        assert done.err.startswith("longreach: error: "), arguments
        assert done.err.count("\n") == 1, arguments
    assert not head.jobs.jobs


def test_stream_prints_tokens(verb: CommandLine, head: FakeHead, report: Path) -> None:
    head.jobs.drops = [3]
    done = verb("submit", "--document", report, "--question", "Why?", "--stream")
    assert done.code == 0
    assert done.out == "".join(WORDS) + "\n"
    job_id = done.err.splitlines()[0]
    assert verb("stream", job_id, "--after", "6").out == "Be sure.\n"
    events = [json.loads(line) for line in verb("stream", job_id, "--json").out.splitlines()]
    assert [event["number"] for event in events if event["event"] == "token"] == list(range(1, 9))
    assert events[-1]["job"]["state"] == "succeeded"


def test_stream_of_several_questions_prints_whole_lines(verb: CommandLine, report: Path) -> None:
    done = verb("submit", "--document", report, "--question", "Why?", "--question", "Who?", "--stream")
    assert done.out.splitlines() == [
        "[1] The answer is forty-two.", "[2] The answer is forty-two.", "[1] Be sure.", "[2] Be sure.",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_detaches(longreach: CommandLine, verb: CommandLine, head: FakeHead, number: signal.Signals) -> None:
    head.jobs.hold_after = 5
    job_id = "job_" + "0" * 32
    head.jobs.jobs[job_id] = pb.Job(id=job_id, state=pb.QUEUED, answers=[pb.Answer()])
    process = longreach.start("stream", job_id)
    shown = read_at_least(process, len("".join(WORDS[:5])))
    process.send_signal(number)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"longreach stream {job_id} --after 5" in err
    assert "Traceback" not in err
    assert not head.jobs.calls["Cancel"]
    head.jobs.released.set()
    again = verb("stream", job_id, "--after", "5")
    assert (shown + rest).rstrip("\n") + again.out == "".join(WORDS) + "\n"


def test_exit_codes(verb: CommandLine, head: FakeHead, longreach: CommandLine, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("once")
    head.jobs.outcome = pb.FAILED
    done = verb("submit", "--prompt-file", prompt, "--wait")
    assert done.code == 1
    assert "the pipeline broke" in done.err.splitlines()[-1]
    for arguments in (["wait", UNKNOWN], ["stream", UNKNOWN], ["cancel", UNKNOWN], ["docs", "rm", UNKNOWN]):
        done = verb(*arguments)
        assert (done.code, done.err.count("\n")) == (4, 1), done.err

    head.jobs.failures["Submit"] = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("retry-after-ms", "4000"),))]
    done = verb("submit", "--prompt-file", prompt)
    assert done.code == 3
    assert "4 s" in done.err
    head.jobs.hold_after = 0
    job_id = verb("submit", "--prompt-file", prompt).out.strip()
    done = verb("wait", job_id, "--timeout", "0.2")
    assert done.code == 1
    done = verb("cancel", UNKNOWN, job_id)
    assert done.code == 4
    assert done.out == f"{job_id} cancelled\n"
    assert verb("wait", job_id).code == 1

    head.stop()
    done = verb("status")
    assert done.code == 3
    assert "longreach up CONFIG" in done.err
    assert done.err.count("\n") == 1


def test_documents_and_status(verb: CommandLine, head: FakeHead, report: Path) -> None:
    added = verb("docs", "add", report).out.strip()
    assert verb("docs").out.splitlines()[1].split()[:4] == [added, "report.txt", "8", "8B"]
    assert [document["id"] for document in json.loads(verb("docs", "list", "--json").out)] == [added]
    assert verb("docs", "rm", added).code == 0
    assert not head.jobs.files
    done = verb("status")
    assert done.code == 0
    assert "25% of 8,192 tokens" in done.out
    assert done.out.splitlines()[-1].split() == ["0", "0", "running", "1,234", "3MiB"]
    assert json.loads(verb("status", "--json").out)["address"] == head.address


def test_address_from_the_state_file(longreach: CommandLine, head: FakeHead, tmp_path: Path) -> None:
    done = longreach("status", "--data-dir", tmp_path)
    assert done.code == 3
    assert "longreach up" in done.err
    (tmp_path / "head.json").write_text(json.dumps({"address": head.address, "pid": 1, "started": 1.0}))
    assert longreach("status", "--data-dir", tmp_path).code == 0
