"""Tables of the job verbs: aligned, never cut, plain in a pipe; and `--json` beside them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli.output import (
    print_answers,
    print_document,
    print_documents,
    print_jobs,
    print_status,
    print_token_counts,
)
from cluster.client.errors import JobFailed
from cluster.client.models import Document, TokenCount

ID = "job_" + "0" * 60


def job(**changes: Any) -> Any:
    data = SimpleNamespace(created=0.0, to_json=lambda: {"id": ID})
    values = {
        "id": ID, "state": "prefilling", "done": False, "data": data, "labels": {},
        "answers": [SimpleNamespace(prompt_tokens=12_345)], "progress": SimpleNamespace(total=0, processed=0),
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out
    assert "\x1b" not in out
    return [line.rstrip() for line in out.splitlines()]


def test_jobs_keep_their_ids_and_labels_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    labels = {"team": "[red]law[/]", "note": ":smile: " + "x" * 100}
    running = job(progress=SimpleNamespace(total=20_000, processed=1_000), labels=labels)
    print_jobs([running, job(state="succeeded", done=True)], as_json=False)
    header, first, second = lines(capsys)
    columns = [header.index(name) for name in ("id", "state", "created", "answers", "tokens read", "labels")]
    assert first[columns[0] : columns[1]].rstrip() == ID
    assert first[columns[4] :].startswith("1,000 of 20,000")
    assert first[columns[5] :] == f"note=:smile: {'x' * 100} team=[red]law[/]"
    assert second[columns[1] :].startswith("succeeded  ")
    assert second[columns[4] :] == "12,345"
    print_jobs([running], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"id": ID}]


def test_no_jobs_are_a_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_jobs([], as_json=False)
    assert lines(capsys) == ["id  state  created  answers  tokens read  labels"]


def test_documents(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Document("doc_1", "a report.txt", 3 << 20, 0.0, 0.0)
    pinned = Document(
        "doc_2", "b\n", 10, 1.0, 0.0, tokens=4_000, pinned=True, stored_tokens=3_584, stored_bytes=7 << 20,
        scale_len=9_000, parent="doc_1", source_hash="ab",
    )  # fmt: skip
    print_documents([plain, pinned], as_json=False)
    header, first, second = lines(capsys)
    assert header.split("  ")[0] == "id"
    columns = ["id", "name", "tokens", "size", "stored KV", "last use", "pinned", "expires"]
    starts = [header.index(name) for name in columns]
    assert first == "doc_1  a report.txt          3MiB"
    assert second[starts[2] :].startswith("4,000   10B   3,584 tokens, 7MiB")
    assert second[starts[6] :].split() == ["pinned", "never"]
    print_documents([plain], as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["size_bytes"] == 3 << 20
    print_document(pinned, as_json=False)
    shown = dict(line.split("  ", 1) for line in lines(capsys))
    assert shown["name"].strip() == r"b\n"
    assert shown["may grow to"].strip() == "9,000 tokens"
    assert shown["stored KV"].strip() == "3,584 tokens, 7MiB"
    print_document(plain, as_json=True)
    assert json.loads(capsys.readouterr().out)["id"] == "doc_1"


def test_token_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [TokenCount(1_000, 3 << 20, 4_000), TokenCount(4_000, 1, 4_000)]
    with pytest.raises(SystemExit) as ended:
        print_token_counts(["a", "b"], counts, "head at h:1", as_json=False)
    assert ended.value.code == 1
    assert lines(capsys)[1:] == ["a       1,000   3MiB  25.0%     yes", "b       4,000   1B    100.0%    no"]
    print_token_counts(["a"], counts[:1], "head at h:1", as_json=True)
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["source"], found["tokens"], found["fits"], found["counted_by"]) == ("a", 1_000, True, "head at h:1")


def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    stage = SimpleNamespace(stage=0, rank=1, state="running", steps_done=1234, resident_bytes=3 << 20)
    status: Any = SimpleNamespace(
        model="m", version="1", uptime_s=200.0, running=1, queued=2, kv_usage=0.25, kv_tokens=8192, max_model_len=4096,
        stages=[stage], problem="", kv_store_bytes=0, kv_store_max_bytes=0,
        repairs=0, full_restarts=0, last_recovery_s=0.0, http_url="", own_only=False,
    )  # fmt: skip
    print_status(status, "h:1", as_json=False)
    assert lines(capsys) == [
        "m at h:1, version 1, up 3 min 20 s",
        "1 running, 2 queued; KV 25% of 8,192 tokens; contexts up to 4,096 tokens", "",
        "stage  rank  state    steps  memory", "0      1     running  1,234  3MiB",
    ]  # fmt: skip
    status.kv_store_bytes, status.kv_store_max_bytes = 3 << 20, 5 << 30
    print_status(status, "h:1", as_json=False)
    assert "stored KV 3MiB of 5GiB; contexts up to" in lines(capsys)[1]
    status.own_only = True
    print_status(status, "h:1", as_json=False)
    assert lines(capsys)[1] == "1 running, 2 queued of this key; KV 8,192 tokens; contexts up to 4,096 tokens"
    status.repairs, status.full_restarts, status.last_recovery_s = 2, 1, 7.4
    print_status(status, "h:1", as_json=False)
    assert lines(capsys)[3] == (
        "recovered 3 times, by replacing stages 2 times, by a full restart 1 times; the last one took 7.4 s"
    )
    status.http_url = "http://127.0.0.1:8000"
    print_status(status, "h:1", as_json=False)
    assert lines(capsys)[0].startswith("m at h:1, HTTP at http://127.0.0.1:8000, version 1")
    status.problem = "the recorder thread has ended:\x1b[2J odd"
    print_status(status, "h:1", as_json=False)
    assert r"not serving: the recorder thread has ended:\x1b[2J odd" in lines(capsys)


def test_a_job_that_read_a_document_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    data = SimpleNamespace(read=True, document_id="doc_1", has_text=True)
    answers = [SimpleNamespace(question="", reasoning="", text="", token_ids=())]
    print_answers(job(state="succeeded", data=data, answers=answers), as_json=False)
    assert lines(capsys) == ["doc_1: has been read"]
    with pytest.raises(JobFailed):
        print_answers(job(state="failed", data=data, answers=answers, error=""), as_json=False)
    assert lines(capsys) == []
