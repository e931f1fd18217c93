"""Jobs through the real door: followers that die, attached jobs, deadlines, priorities, requests that are wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import cluster
from cluster import Client, TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs import service as service_module
from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsStub
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.head import LONG, ROOT, Served, free_port, tokens_of, until

MIB = 1 << 20


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRuntime]:
    """One sequence at a time, so that everything else waits."""
    overrides: dict[str, object] = {
        "model.dtype": "float32", "data_dir": str(tmp_path_factory.mktemp("data")), "server.port": free_port(),
        "prefill.max_num_seqs": 1, "prefill.max_num_batched_tokens": 256,
    }  # fmt: skip
    with ClusterRuntime(load_deployment(ROOT / "configs" / "single.yaml", overrides)) as running:
        yield running


@pytest.fixture
def serve(runtime: ClusterRuntime, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(**limits: Any) -> Served:
            folder = tmp_path / str(time.monotonic_ns())
            return stack.enter_context(Served(runtime, folder, **limits))

        yield start


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve(max_queued_jobs=100, max_document_bytes=MIB)


def check_idle(served: Served) -> None:
    until(lambda: not served.service._live and not served.runtime.kv_usage, "all pages are back")
    check_engine(served.runtime.engine)


def follow(address: str, job_id: str, after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "stream", job_id, "--address", address, "--json"]
    return subprocess.Popen(
        [*command, "--after", str(after)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def numbers_and_ids(lines: list[str]) -> list[tuple[int, int]]:
    """Number and token id of every line that is whole and tells of a token."""
    found = []
    for line in lines:
        if not line.endswith("\n"):
            continue  # its writer was killed
        event = json.loads(line)
        if "number" in event and "token" in event:
            found.append((event["number"], event["token"]["token_id"]))
    return found


def test_killed_client_loses_no_token(served: Served) -> None:
    job = served.client.submit(prompt="The code of dark river is", max_tokens=1500, ignore_eos=True)
    first = follow(served.address, job.id)
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line)
        if len(numbers_and_ids(lines)) >= 5:
            break
    first.kill()
    lines += first.stdout.readlines()
    first.wait()
    before = numbers_and_ids(lines)
    assert not job.refresh().done
    second = follow(served.address, job.id, before[-1][0])
    out, err = second.communicate(timeout=LONG)
    assert second.returncode == 0, err
    joined = before + numbers_and_ids(out.splitlines(keepends=True))
    assert [number for number, _ in joined] == list(range(1, 1501))
    assert tuple(token for _, token in joined) == tokens_of(job)[0]


def test_follower_that_never_reads(served: Served) -> None:
    """It costs a thread and one position: no memory, and nobody else waits."""
    job = served.client.submit(prompt="The code of dark river is", max_tokens=1500, ignore_eos=True, logprobs=5)
    job.wait(LONG)
    with contextlib.ExitStack() as stack:
        before = psutil.Process().memory_info().rss
        for _ in range(8):
            channel = stack.enter_context(grpc.insecure_channel(served.address))
            stub = JobsStub(channel)
            call = stub.Stream(pb.StreamRequest(id=job.id))
            stack.callback(call.cancel)
            next(call)
        other = served.client.submit(prompt="Once", max_tokens=20, ignore_eos=True)
        assert len([event for event in other.stream() if isinstance(event, TokenEvent)]) == 20
        assert psutil.Process().memory_info().rss - before < 100 * MIB
    check_idle(served)


def test_duplicates_in_parallel(served: Served) -> None:
    def once(_: int) -> str:
        return served.client.submit(prompt="Once", max_tokens=4, ignore_eos=True, idempotency_key="same").id

    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(once, range(50)))
    assert len(ids) == 1
    assert [job.id for job in served.client.jobs()] == list(ids)
    with pytest.raises(cluster.Conflict, match="idempotency_key"):
        served.client.submit(prompt="Once", max_tokens=5, idempotency_key="same")
    job = served.client.job(ids.pop())
    assert len(tokens_of(job)[0]) == job.data.last_event == 4


def test_structured_outputs(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}},
        "required": ["a"],
    }
    closed = schema | {"additionalProperties": False}
    job = served.client.submit(prompt="Once", max_tokens=400, temperature=1.0, structured_outputs={"json": closed})
    answer = json.loads(job.result.text)
    assert answer["a"] in ("x", "yes")
    assert answer.keys() <= {"a", "b"}
    document = "The code of dark river is 1. " * 20
    options: Any = {"max_tokens": 30, "structured_outputs": {"choice": ["the river", "none"]}}
    answers = served.client.submit(document, ["Which?", "What?"], **options).result
    assert {one.text for one in answers} <= {"the river", "none"}
    assert {one.finish_reason for one in answers} == {"stop"}
    check_idle(served)


def test_cancel_in_every_state(served: Served) -> None:
    decoding = served.occupy()
    queued = served.client.submit(prompt="Once", max_tokens=5)
    assert queued.cancel().state == "cancelled"
    assert decoding.refresh().state == "decoding"
    assert decoding.cancel().state == "cancelled"
    assert 0 < decoding.data.last_event < 3000
    assert len(decoding.answers[0].token_ids) == decoding.data.last_event
    prefilling = served.client.submit(token_ids=list(range(100, 4000)), max_tokens=5)
    until(lambda: prefilling.refresh().state != "queued", "a prefill")
    assert prefilling.state == "prefilling"
    assert prefilling.cancel().state == "cancelled"
    assert prefilling.data.last_event == 0
    for job in (queued, decoding, prefilling):
        assert job.cancel().state == "cancelled"
        assert job.cancel().data == job.data
    done = served.client.submit(prompt="Once", max_tokens=2).wait()
    assert done.cancel().state == "succeeded"
    check_idle(served)


def test_attached_jobs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_tokens": 3500, "ignore_eos": True, "attached": True}
    job = served.client.submit(prompt="The code of dark river is", **options)
    for event in job.stream():
        if isinstance(event, TokenEvent) and event.number == 3:
            break  # closes the stream
    assert job.wait(LONG).state == "cancelled"
    killed = served.client.submit(prompt="The code of old stone is", **options)
    follower = follow(served.address, killed.id)
    assert follower.stdout is not None
    assert follower.stdout.readline()
    follower.kill()
    follower.communicate()
    assert killed.wait(LONG).state == "cancelled"
    monkeypatch.setattr(service_module, "_ATTACH_WITHIN_S", 0.2)
    lonely = served.client.submit(prompt="The code of red house is", **options)
    assert lonely.wait(LONG).state == "cancelled"
    check_idle(served)


def test_deadlines(served: Served) -> None:
    decoding = served.client.submit(prompt="The code is", max_tokens=3900, ignore_eos=True, deadline_s=0.6)
    queued = served.client.submit(prompt="Once", max_tokens=3, deadline_s=0.3)
    for job in (queued, decoding):
        job.wait(LONG)
        assert (job.state, job.error) == ("failed", "deadline exceeded")
        with pytest.raises(cluster.JobFailed, match="deadline exceeded"):
            _ = job.result
    assert queued.data.last_event == 0
    check_idle(served)


def test_priority_queue_and_delete(serve: Callable[..., Served]) -> None:
    served = serve(max_queued_jobs=4)
    running = served.occupy()
    jobs = {p: served.client.submit(prompt="Once", max_tokens=8, ignore_eos=True, priority=p) for p in (0, 3, -1, 7)}
    with pytest.raises(cluster.Busy, match="max_queued_jobs") as caught:
        served.client.submit(prompt="Once")
    assert caught.value.retry_after_s >= 1
    with pytest.raises(cluster.Conflict, match="cancel it first"):
        running.delete()
    running.cancel()
    running.delete()
    with pytest.raises(cluster.NotFound):
        running.refresh()
    finished = {p: job.wait(LONG).data.finished or 0.0 for p, job in jobs.items()}
    assert sorted(finished, key=lambda p: finished[p]) == [7, 3, 0, -1]
    check_idle(served)


def test_results_expire(serve: Callable[..., Served]) -> None:
    served = serve(result_ttl_s=1.0)
    job = served.client.submit(prompt="Once", max_tokens=2).wait()
    served.service._sweep(time.time() + 2.0)
    with pytest.raises(cluster.NotFound, match="expired"):
        job.refresh()


def test_unfinished_jobs_go_on_under_the_next_service(runtime: ClusterRuntime, tmp_path: Path) -> None:
    first = Served(runtime, tmp_path)
    with first:
        expected = tokens_of(first.client.submit(prompt="The code is", max_tokens=900, ignore_eos=True))
        job = first.client.submit(prompt="The code is", max_tokens=900, ignore_eos=True)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        service = first.service
        service.drain(0.0)
        with pytest.raises(cluster.Unavailable, match="shutting down"):
            first.client.submit(prompt="Once")
        for handle in service._live[job.id].handles:
            service.close()
            runtime.engine.cancel(handle)  # the engine outlives this service, which a head's does not
        with Served(runtime, tmp_path) as second:
            again = second.client.job(job.id)
            assert tokens_of(again) == expected
            assert again.data.restarts == 1
            check_idle(second)


def endless_upload(served: Served, sent: list[int]) -> pb.Document:
    """Streams a gigabyte unless it is refused before."""
    piece = bytes(MIB)
    stop = threading.Event()

    def pieces() -> Iterator[pb.DocumentPiece]:
        yield pb.DocumentPiece(header=pb.DocumentHeader(name="gigabyte"))
        for _ in range(1024):
            if stop.is_set():
                return
            sent.append(len(piece))
            yield pb.DocumentPiece(data=piece)

    with grpc.insecure_channel(served.address) as channel:
        try:
            return JobsStub(channel).UploadDocument(pieces(), timeout=LONG)
        finally:
            stop.set()


def test_gigabyte_is_refused_early(served: Served, tmp_path: Path) -> None:
    sent: list[int] = []
    with pytest.raises(grpc.RpcError) as caught:
        endless_upload(served, sent)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(MIB) in caught.value.details()
    assert len(sent) < 100
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(cluster.InvalidRequest, match="1073741824 bytes: must be at most"):
        served.client.submit(path, "What?")
    assert not list((served.folder / "documents").iterdir())


BAD: list[tuple[Callable[[Client], object], type[Exception], str]] = [
    (lambda c: c.job("job_" + "0" * 32), cluster.NotFound, "not found"),
    (lambda c: c.job("../../etc/passwd"), cluster.InvalidRequest, "32 hexadecimal"),
    (lambda c: c.job("job_../x"), cluster.InvalidRequest, "32 hexadecimal"),
    (lambda c: c.job("doc_" + "0" * 32), cluster.InvalidRequest, "job id"),
    (lambda c: c.documents.get("doc_../../../etc/passwd"), cluster.InvalidRequest, "doc id"),
    (lambda c: c.documents.delete("../../etc/passwd"), cluster.InvalidRequest, "doc id"),
    (lambda c: c.submit("text", []), cluster.InvalidRequest, "question"),
    (lambda c: c.submit("text", [""]), cluster.InvalidRequest, "question"),
    (lambda c: c.submit("", "What?"), cluster.InvalidRequest, "document"),
    (lambda c: c.submit(prompt="Once", max_tokens=0), cluster.InvalidRequest, "max_tokens: 0"),
    (lambda c: c.submit(prompt="Once", max_tokens=-1), cluster.InvalidRequest, "-1"),
    (lambda c: c.submit(prompt="Once", temperature=-1.0), cluster.InvalidRequest, "temperature"),
    (lambda c: c.submit(prompt="Once", top_p=0.0), cluster.InvalidRequest, "top_p"),
    (lambda c: c.submit(prompt="Once", deadline_s=0.0), cluster.InvalidRequest, "deadline"),
    (lambda c: c.submit(prompt="Once", deadline_s=-5.0), cluster.InvalidRequest, "deadline"),
    (lambda c: c.submit(prompt="Once", structured_outputs={"regex": "a(?=b)"}), cluster.InvalidRequest, "look-around"),
    (
        lambda c: c.submit(prompt="Once", structured_outputs={"json": {"not": {}}}),
        cluster.InvalidRequest,
        "not at #: is",
    ),
    (lambda c: c.submit(prompt=""), cluster.InvalidRequest, "prompt"),
    (lambda c: c.submit(token_ids=[]), cluster.InvalidRequest, "token"),
    (lambda c: c.submit(token_ids=[5, 4096]), cluster.InvalidRequest, "4096 at index 1: must be between 0 and 4095"),
    (lambda c: c.submit(token_ids=[5, -1]), cluster.InvalidRequest, "-1"),
    (lambda c: c.submit(token_ids=[1 << 40]), cluster.InvalidRequest, "1099511627776"),
    (lambda c: c.submit(token_ids=[7] * 4090, max_tokens=10), cluster.InvalidRequest, "4090 .* 4096.* at most 4086"),
    (lambda c: c.submit("word " * 5000, "What?", max_tokens=10), cluster.InvalidRequest, "max_model_len is 4096"),
    (lambda c: list(c.submit(prompt="Once", max_tokens=1).wait().stream(after=99)), cluster.InvalidRequest, "after"),
    (lambda c: list(c.jobs(limit=0)), cluster.InvalidRequest, "limit"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_requests(index: int, broad: Served) -> None:
    call, kind, message = BAD[index]
    with pytest.raises(kind, match=message) as caught:
        call(broad.client)
    assert "\n" not in str(caught.value)
    assert "internal" not in str(caught.value)


@pytest.fixture(scope="module")
def broad(runtime: ClusterRuntime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(runtime, tmp_path_factory.mktemp("broad")) as running:
        yield running
        check_idle(running)
