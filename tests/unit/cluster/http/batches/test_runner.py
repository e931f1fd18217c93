"""Work on batches: every line is answered once, whatever happens, and others do not wait for it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.access.keys import ApiKeys
from cluster.common.errors import JobStoreError
from cluster.http.batches import runner as runner_module
from cluster.jobs.model import FINAL, JobRecord, JobState
from cluster.jobs.sqlite.batches import BatchStatus
from cluster.jobs.tenants.tenant import Tenant
from tests.support.data.clients.batch_lines import chat
from tests.support.fakes.stage import eventually
from tests.unit.cluster.http.batches.conftest import TEAM, Batches

S = BatchStatus
LINES = [chat(f"c{n}", f"question {n}") for n in range(6)]


def ids(results: list[dict[str, Any]]) -> list[str]:
    return [result["custom_id"] for result in results]


def test_good_and_bad_lines(batches: Batches) -> None:
    wrong = chat("wrong", model="gpt-4o")
    batch_id = batches.create([LINES[0], "{", chat("n9", n=9), LINES[1], wrong, chat("s", stream=True)])
    batches.runner.start()
    batch = batches.reaches(batch_id, S.COMPLETED)
    assert (batch.total, batch.completed, batch.failed) == (6, 3, 3)
    good, bad = batches.results(batch.output), batches.results(batch.errors)
    assert ids(good) == ["c0", "c1", "s"]
    assert {result["response"]["body"]["object"] for result in good} == {"chat.completion"}
    assert [result["response"]["body"]["usage"]["completion_tokens"] for result in good] == [3, 3, 3]
    assert ids(bad) == [None, "n9", "wrong"]
    assert [result["response"]["status_code"] for result in bad] == [400, 400, 404]
    assert bad[1]["response"]["body"]["error"]["param"] == "n"
    jobs = batches.jobs(batch_id)
    assert {(job.spec.priority, job.spec.labels["batch"]) for job in jobs} == {(-1, batch_id)}
    assert [job.spec.labels["custom_id"] for job in jobs] == ids(good)
    outputs = [batches.bench.service.documents.get(one) for one in (batch.output, batch.errors)]
    assert {record.purpose for record in outputs} == {"batch_output"}


def test_a_line_may_have_several_answers(batches: Batches) -> None:
    batch_id = batches.create([chat("n2", n=2)])
    batches.runner.start()
    (result,) = batches.results(batches.reaches(batch_id, S.COMPLETED).output)
    body = result["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 6
    assert len(batches.jobs(batch_id)) == 2


def test_a_line_may_have_several_prompts(batches: Batches) -> None:
    body = {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    batch_id = batches.create([line], "/v1/completions")
    batches.runner.start()
    (result,) = batches.results(batches.reaches(batch_id, S.COMPLETED).output)
    assert [choice["index"] for choice in result["response"]["body"]["choices"]] == [0, 1]
    assert len(batches.jobs(batch_id)) == 2


@pytest.mark.parametrize(("lines", "code"), [([], "empty_file"), (["", " "], "empty_file"), (["{"], "invalid_request")])
def test_an_input_without_requests_fails(batches: Batches, lines: list[Any], code: str) -> None:
    batch_id = batches.create(lines)
    batches.runner.start()
    assert batches.reaches(batch_id, S.FAILED).problems[0]["code"] == code


def test_too_many_requests_fail(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MAX_LINES", 5)
    batch_id = batches.create(LINES)
    batches.runner.start()
    assert batches.reaches(batch_id, S.FAILED).problems[0]["code"] == "too_many_requests"


def test_an_input_that_is_damaged_fails(batches: Batches) -> None:
    batch_id = batches.create(LINES)
    batches.bench.service.documents.path(batches.get(batch_id).input).write_bytes(b"x")
    batches.runner.start()
    assert batches.reaches(batch_id, S.FAILED).problems[0]["code"] == "invalid_input_file"


def test_few_lines_at_a_time_in_turn_and_behind_others(batches: Batches) -> None:
    batches.bench.runtime.shard.hold()
    batch_ids = [batches.create([*LINES[:4], chat(name)]) for name in ("x", "y")]
    batches.runner.start()
    eventually(lambda: batches.bench.service.counts() != (0, 0) and len(batches.runner._active) == 2)
    assert [len(batches.jobs(batch_id)) for batch_id in batch_ids] == [1, 1]
    mine = batches.bench.submit()
    batches.bench.runtime.shard.let(10_000)
    for batch_id in batch_ids:
        assert batches.reaches(batch_id, S.COMPLETED).completed == 5
    mine_finished = batches.bench.service.get(mine).finished
    later = [job for batch_id in batch_ids for job in batches.jobs(batch_id)[1:]]
    assert mine_finished is not None
    assert all(mine_finished <= job.finished for job in later)


def test_the_next_head_goes_on_and_every_line_is_answered_once(batches: Batches) -> None:
    batch_id = batches.create(LINES)
    batches.runner.start()
    eventually(lambda: batches.get(batch_id).completed >= 1)
    for _ in range(4):
        batches.restart()
        batches.bench.runtime.shard.hold()
        batches.runner.start()
        batches.bench.runtime.shard.let(3)
    batches.bench.runtime.shard.let(10_000)
    batch = batches.reaches(batch_id, S.COMPLETED)
    assert ids(batches.results(batch.output)) == [f"c{n}" for n in range(6)]
    assert (batch.completed, batch.failed, batch.errors) == (6, 0, "")
    assert [job.spec.labels["custom_id"] for job in batches.jobs(batch_id)] == [f"c{n}" for n in range(6)]


@pytest.mark.parametrize("restarts", [False, True])
def test_cancelling_keeps_what_was_answered(batches: Batches, restarts: bool) -> None:
    batches.bench.runtime.shard.hold()
    batch_id = batches.create(LINES)
    batches.runner.start()
    eventually(lambda: len(batches.runner._active) == 2)
    first = batches.jobs(batch_id)[0].id
    batches.bench.service.cancel(first)  # by somebody who sees the job
    eventually(lambda: batches.get(batch_id).failed == 1)
    assert batches.bench.service.batches.move_batch(batch_id, [S.IN_PROGRESS], S.CANCELLING)
    if restarts:
        batches.restart()
        batches.bench.runtime.shard.hold()
        batches.runner.start()
    batches.backend.batches_changed.set()
    batch = batches.reaches(batch_id, S.CANCELLED)
    assert (batch.total, batch.completed, batch.failed, batch.output) == (6, 0, 6, "")
    results = batches.results(batch.errors)
    assert ids(results) == [f"c{n}" for n in range(6)]
    assert results[0]["response"]["body"]["error"]["code"] == "job_cancelled"
    assert results[-1]["error"]["code"] == "batch_cancelled"
    assert all(job.state in FINAL for job in batches.jobs(batch_id))


def test_a_batch_that_is_not_done_in_time_expires(batches: Batches) -> None:
    batches.bench.runtime.shard.hold()
    batch_id = batches.create(LINES, completion_window="1h")
    batches.runner.start()
    eventually(lambda: len(batches.runner._active) == 2)
    batches.bench.ahead = 3601.0
    batches.backend.batches_changed.set()
    batch = batches.reaches(batch_id, S.EXPIRED)
    assert {result["error"]["code"] for result in batches.results(batch.errors) if result["error"]} == {"batch_expired"}
    assert batch.failed == 6
    assert not [job for job in batches.jobs(batch_id) if job.state is JobState.QUEUED]


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    batches = Batches(tmp_path, max_batch_jobs=4, max_queued_jobs=1)
    try:
        batches.bench.runtime.shard.hold()
        batch_id = batches.create(LINES)
        batches.runner.start()
        eventually(lambda: batches.runner._retry_at)
        batches.bench.runtime.shard.let(10_000)
        while not batches.get(batch_id).status.is_final:
            batches.bench.ahead += 15.0
            batches.backend.batches_changed.set()
            batches.bench.runtime.shard.let(100)
        assert batches.get(batch_id).completed == 6
    finally:
        batches.close()


def test_lines_keep_the_limits_of_their_key(tmp_path: Path) -> None:
    keys = ApiKeys({"k" * 20: replace(TEAM, max_queued_jobs=1)})
    batches = Batches(tmp_path, keys, max_batch_jobs=8)
    try:
        batches.bench.runtime.shard.hold()
        others = [batches.bench.submit() for _ in range(4)]  # take all places
        batch_id = batches.create(LINES)
        batches.runner.start()
        eventually(lambda: batches.runner._retry_at)
        assert len(batches.jobs(batch_id)) == 1
        batches.bench.runtime.shard.let(10_000)
        while not batches.get(batch_id).status.is_final:
            batches.bench.ahead += 15.0
            batches.backend.batches_changed.set()
            batches.bench.runtime.shard.let(100)
        assert batches.get(batch_id).completed == 6
        assert all(batches.bench.state(one) is JobState.SUCCEEDED for one in others)
    finally:
        batches.close()


def test_a_batch_waits_while_its_owner_has_no_key(tmp_path: Path) -> None:
    keys = LiveKeysOf("other")
    batches = Batches(tmp_path, keys, max_batch_jobs=8)
    try:
        batch_id = batches.create(LINES)
        batches.runner.start()
        batches.reaches(batch_id, S.IN_PROGRESS)
        batches.runner.close()
        batches.runner.look()
        assert batches.jobs(batch_id) == []
        keys.name = TEAM.name
        batches.restart()
        batches.runner.start()
        assert batches.reaches(batch_id, S.COMPLETED).completed == 6
    finally:
        batches.close()


def test_the_lines_of_an_admin_see_what_the_admin_sees(tmp_path: Path) -> None:
    batches = Batches(tmp_path, ApiKeys({"k" * 20: replace(TEAM, is_admin=True)}), max_batch_jobs=2)
    try:
        other = batches.bench.service.add_document("a", [b"words"], 99, tenant=Tenant("other"))
        content = [{"type": "text", "text": "why?"}, {"type": "file", "file": {"file_id": other.id}}]
        batch_id = batches.create([chat("a", messages=[{"role": "user", "content": content}])])
        batches.runner.start()
        assert batches.reaches(batch_id, S.COMPLETED).completed == 1
    finally:
        batches.close()


class LiveKeysOf:
    """Keys of one name, which may change."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tenant(self, key: str) -> Tenant | None:
        return None

    def named(self, name: str) -> Tenant | None:
        return Tenant(name) if name == self.name else None


def test_a_job_that_somebody_deletes_is_an_error_of_its_line(batches: Batches) -> None:
    batches.bench.runtime.shard.hold()
    batch_id = batches.create(LINES[:1])
    batches.runner.start()
    eventually(lambda: len(batches.runner._active) == 1)
    job_id = batches.jobs(batch_id)[0].id
    with batches.bench.store._db.writing() as db:
        db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
    batches.runner._ended.put(job_id)
    batches.backend.batches_changed.set()
    batch = batches.reaches(batch_id, S.COMPLETED)
    assert batches.results(batch.errors)[0]["response"]["status_code"] == 404


def test_batches_of_another_version_are_left_alone(batches: Batches) -> None:
    unknown, damaged, fine = (batches.create(LINES[:1]) for _ in range(3))
    with batches.bench.store._db.writing() as db:
        db.execute("UPDATE batches SET endpoint = '/v2/new' WHERE id = ?", (unknown,))
        db.execute("UPDATE batches SET status = 'resting' WHERE id = ?", (damaged,))
    batches.runner.start()
    batches.reaches(fine, S.COMPLETED)
    assert "/v2/new" in str(batches.reaches(unknown, S.FAILED).problems[0]["message"])
    assert batches.get(damaged).problems[0]["code"] == "damaged"


def test_a_store_that_cannot_be_used_is_waited_for(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = batches.create(LINES)
    tries: list[int] = []
    answer_line = batches.bench.store.answer_line

    def refuse(*given: Any) -> bool:
        tries.append(1)
        if len(tries) < 3:
            batches.backend.batches_changed.set()
            raise JobStoreError("job store: locked") if len(tries) == 1 else ZeroDivisionError
        return answer_line(*given)

    monkeypatch.setattr(batches.bench.store, "answer_line", refuse)
    batches.runner.start()
    batch = batches.reaches(batch_id, S.COMPLETED)
    assert (batch.completed, batch.failed) == (6, 0)
    assert not batches.runner.thread.problem


def test_a_head_that_ends_leaves_a_batch_that_is_being_cancelled_to_the_next(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches.bench.runtime.shard.hold()
    batch_id = batches.create(LINES)
    batches.runner.start()
    eventually(lambda: len(batches.runner._active) == 2)
    tried = threading.Event()

    def never_ends(job_id: str) -> JobRecord:
        tried.set()
        return batches.bench.service.get(job_id)

    monkeypatch.setattr(batches.bench.service, "cancel", never_ends)
    batches.bench.service.batches.move_batch(batch_id, [S.IN_PROGRESS], S.CANCELLING)
    batches.backend.batches_changed.set()
    assert tried.wait(30)
    batches.restart()
    assert batches.get(batch_id).status is S.CANCELLING
    batches.runner.start()
    assert batches.reaches(batch_id, S.CANCELLED).failed == 6
