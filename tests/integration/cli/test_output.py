"""What a terminal shows of texts from outside, in every verb; pipes get answers and JSON as they are."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.jobs import jobs_pb2 as pb
from tests.support.fakes import server as fakes
from tests.support.fakes.server import FakeHead, FakeJobs
from tests.support.paths import ROOT

EVIL = "evil\x1b]0;owned\x07\x1b[31mred\x9b2J\x7f\x08\x00\r\u202ercs\u2066\u200b\ufeffend"
LINES = f"{EVIL}\nforged line"  # for what is shown on one line
DANGER = ("\x1b]0;", "\x07", "\x1b[31m", "\x9b", "\x7f", "\x08", "\x00", "\u202e", "\u2066", "\u200b", "\ufeff")
ESCAPED = r"evil\x1b]0;owned\x07\x1b[31mred\x9b2J\x7f\x08\x00\r\u202ercs\u2066\u200b\ufeffend"
DOCUMENT = "doc_" + "0" * 32


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    monkeypatch.setattr(fakes, "WORDS", (EVIL, "\n", *fakes.WORDS[2:]))
    stage = pb.StageStatus(state=LINES)
    status = pb.ClusterStatusReply(model=LINES, version=LINES, stages=[stage], uptime_s=1.0)
    monkeypatch.setattr(FakeJobs, "ClusterStatus", lambda self, request, context: status)
    running = FakeHead()
    running.jobs.files[DOCUMENT] = pb.Document(id=DOCUMENT, name=LINES, size_bytes=5, created=1.0, expires=2.0)
    monkeypatch.setenv("LONGREACH_ADDRESS", running.address)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield running
    running.stop()


def on_terminal(*arguments: str) -> str:
    """Run a verb with both outputs on one terminal and return what that gets."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 1 << 16):
                shown.extend(data)
        except OSError:
            pass  # Linux's way of saying that nobody writes any more

    reader = threading.Thread(target=read)
    reader.start()
    try:
        process.wait(60)
    finally:
        process.kill()
        reader.join(10)
        os.close(master)
    return shown.decode().replace("\r\n", "\n")


def submitted(head: FakeHead, questions: int, outcome: int = pb.SUCCEEDED) -> str:
    """A job that ends at the next wait, hostile in every field."""
    job_id = f"job_{len(head.jobs.jobs):032x}"
    answers = [pb.Answer(question=LINES, reasoning=EVIL) for _ in range(questions)]
    job = pb.Job(id=job_id, state=pb.QUEUED, created=1.0, answers=answers, labels={LINES: LINES}, error=LINES)
    head.jobs.jobs[job_id] = job
    head.jobs.outcome = outcome
    return job_id


@pytest.mark.parametrize(
    ("verb", "questions"),
    [
        (["jobs"], 1), (["wait", "JOB"], 1), (["wait", "JOB"], 2), (["stream", "JOB"], 1), (["stream", "JOB"], 2),
        (["docs"], 0), (["status"], 0), (["jobs", "--json"], 1),
        (["stream", "JOB", "--json"], 1),
    ],
)  # fmt: skip
def test_a_terminal_is_not_controlled_from_outside(head: FakeHead, verb: list[str], questions: int) -> None:
    job_id = submitted(head, questions) if questions else ""
    shown = on_terminal(*(job_id if word == "JOB" else word for word in verb))
    assert "evil" in shown
    assert "\nforged" not in shown
    assert [sign for sign in DANGER if sign in shown] == []
    if "--json" in verb:
        values = [json.loads(line[line.index(line.strip()[0]) :]) for line in shown.splitlines() if "evil" in line]
        assert values
    else:
        assert ESCAPED in shown


@pytest.mark.parametrize("verb", ["submit", "wait", "cancel"])
def test_errors_are_one_line(head: FakeHead, verb: str, tmp_path: Path) -> None:
    head.jobs.failures["Get" if verb != "submit" else "Submit"] = [(grpc.StatusCode.NOT_FOUND, LINES, ())]
    document = tmp_path / "report.txt"
    document.write_text("a report")
    given = ["--document", str(document), "--question", "Why?"] if verb == "submit" else [EVIL.replace("\x00", "")]
    shown = on_terminal(verb, *given)
    assert [sign for sign in DANGER if sign in shown] == []
    (line,) = shown.splitlines()
    assert line.startswith(rf"longreach: error: {ESCAPED[:20]}")


def test_the_reason_of_a_failed_job_is_one_line(head: FakeHead) -> None:
    shown = on_terminal("submit", "--prompt-file", str(ROOT / "configs" / "demo.yaml"), "--label", f"a={EVIL[:9]}")
    assert shown.startswith("job_")
    head.jobs.outcome = pb.FAILED
    job = next(iter(head.jobs.jobs.values()))
    head.jobs.failures["Wait"] = [(grpc.StatusCode.FAILED_PRECONDITION, LINES, ())]
    shown = on_terminal("wait", job.id)
    assert shown.count("\n") == 1
    assert [sign for sign in DANGER if sign in shown] == []


def test_pipes_get_answers_and_json_as_they_are(head: FakeHead) -> None:
    job_id = submitted(head, 1)
    command = [sys.executable, "-m", "cluster.cli"]
    plain = subprocess.run([*command, "wait", job_id], capture_output=True, timeout=60, check=True).stdout
    assert EVIL.encode() in plain
    raw = subprocess.run([*command, "jobs", "--json"], capture_output=True, timeout=60, check=True).stdout
    (job,) = json.loads(raw)
    assert job["labels"] == {LINES: LINES}
    assert "\u202e".encode() in raw
    table = subprocess.run([*command, "jobs"], capture_output=True, timeout=60, check=True).stdout.decode()
    assert [sign for sign in DANGER if sign in table] == []  # a line of a table is one line everywhere
    assert len(table.splitlines()) == 2
