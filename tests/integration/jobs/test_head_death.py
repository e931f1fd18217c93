"""A head or a stage is killed while jobs run: what was accepted ends with the tokens of an undisturbed run."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import psutil
import pytest

import cluster
from cluster.bench.head_process import marked_processes
from cluster.client.client import Client
from cluster.tools.eval.haystack import Haystack, is_right
from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsStub
from tests.support.rigs.head import LONG, HeadProcess, tokens_of, until
from tests.support.rigs.head_jobs import DECODES, long_document, submit

# hangs are noticed after five seconds instead of twenty
_SOON = """
from functools import partial
from cluster.engine import pipeline
pipeline.HangDetector = partial(pipeline.HangDetector, floor_s=5.0)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadProcess]:
    made = HeadProcess(tmp_path_factory.mktemp("head"), server="  drain_timeout_s: 60")
    made.prelude = _SOON
    with made as running:
        yield running


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return long_document()


class HangingUpload:
    """An upload that has sent one piece and never ends by itself."""

    def __init__(self, head: HeadProcess) -> None:
        self._go = threading.Event()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{head.port}")
        self._call = JobsStub(self._channel).UploadDocument.future(self._pieces())
        folder = head.data / "documents"
        until(lambda: any(p.stat().st_size for p in folder.glob(".upload-*")), "half a document on the disk")

    def _pieces(self) -> Iterator[pb.DocumentPiece]:
        yield pb.DocumentPiece(header=pb.DocumentHeader(name="half"))
        yield pb.DocumentPiece(data=b"half a document " * 1000)
        self._go.wait(LONG)

    def close(self) -> None:
        assert self._call.exception(LONG) is not None
        self._go.set()
        self._channel.close()


def test_five_jobs_survive_two_kills(head: HeadProcess, haystack: Haystack) -> None:
    with head.client() as client:
        jobs = [submit(client, number, haystack) for number in range(2)]
        until(lambda: jobs[1].refresh().data.last_event >= 5, "a decoding job")
        jobs += [submit(client, number, haystack) for number in range(2, 5)]
        states = [job.refresh().state for job in jobs]
        assert states[0] == "prefilling"
        assert states[1] == "decoding"
        assert states[3:] == ["queued"] * 2
        upload = HangingUpload(head)
        head.kill()
        upload.close()

        head.start()
        seen = jobs[1].refresh().data
        assert seen.last_event >= 5
        assert seen.restarts == 1
        upload = HangingUpload(head)
        head.kill()  # while it takes up what the first one left
        upload.close()

        head.start()
        found = [tokens_of(job) for job in jobs]
        assert all(is_right(a.text, n) for a, n in zip(jobs[0].answers, haystack.needles, strict=True))
        assert all(1 <= job.data.restarts <= 2 for job in jobs[:2]), "2 if it ran again before the second kill"
        assert [len(answer) for answer in found[1]] == [DECODES]
        events = list(jobs[1].stream())
        assert [e.number for e in events if isinstance(e, cluster.TokenEvent)] == list(range(1, DECODES + 1))

        stored = client.documents.list()
        assert "half" not in [document.name for document in stored]
        until(lambda: not list((head.data / "documents").glob(".upload-*")), "halves are swept")
        assert {p.stem for p in (head.data / "documents").iterdir()} == {document.id for document in stored}

        undisturbed = [submit(client, number, haystack) for number in range(5)]
        assert [tokens_of(job) for job in undisturbed] == found
        assert [job.data.restarts for job in undisturbed] == [0] * 5


def test_killed_stage_is_replaced(head: HeadProcess, haystack: Haystack) -> None:
    with head.client() as client:
        expected = [tokens_of(submit(client, number, haystack)) for number in (1, 3)]
        jobs = [submit(client, number, haystack) for number in (1, 3)]
        until(lambda: jobs[0].refresh().data.last_event >= 5, "a decoding job")
        (actor,) = head.actors()
        actor.kill()
        until(lambda: jobs[0].refresh().state == "recovering", "a recovering job")
        assert client.status().model == "needle"  # answers while the pipeline starts
        late = submit(client, 3, haystack)
        doomed = submit(client, 2, haystack)
        assert doomed.cancel().state == "cancelled"
        assert [tokens_of(job) for job in jobs] == expected
        assert tokens_of(late) == expected[1]
        assert jobs[0].data.restarts == 1
        assert doomed.refresh().data.last_event == 0
        assert head.process.poll() is None
        (replacement,) = head.actors()
        assert replacement.pid != actor.pid

        replacement.kill()  # while nothing runs: noticed all the same
        until(lambda: client.status().stages[0].state == "restarting", "a pipeline that starts again")
        until(lambda: client.status().stages[0].state == "running", "a pipeline that is back")
        assert [p.pid for p in head.actors()] != [replacement.pid]
        assert tokens_of(submit(client, 1, haystack)) == expected[0]


def test_hung_stage_is_replaced(head: HeadProcess, haystack: Haystack) -> None:
    """A stage that stops answering, though its process lives: late after 5 s here, then replaced like a dead one."""
    with head.client() as client:
        expected = tokens_of(submit(client, 1, haystack))
        job = submit(client, 1, haystack)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        (actor,) = head.actors()
        actor.suspend()
        assert tokens_of(job) == expected
        assert job.data.restarts == 1
        until(lambda: not actor.is_running() or actor.status() == psutil.STATUS_ZOMBIE, "the hung stage has ended")


def is_refused(address: str) -> bool:
    try:
        with Client(address) as client:
            client.submit(prompt="Once", max_tokens=1)
    except (cluster.Busy, cluster.Unavailable):
        return True
    return False


def test_drain_and_the_next_head(head: HeadProcess, haystack: Haystack) -> None:
    """SIGTERM: what runs may finish, nothing new is taken, and the head leaves nothing behind."""
    with head.client() as client:
        expected = tokens_of(submit(client, 1, haystack))
        job = submit(client, 1, haystack)
        until(lambda: job.refresh().data.last_event >= 1, "a decoding job")
        head.terminate()
        until(lambda: is_refused(client.address), "a head that takes nothing new")
        assert head.process.wait(LONG) == 0
        until(lambda: not marked_processes(head.mark), "nothing is left", 5.0)
        head.start()
        job.refresh()
        assert (job.state, job.data.restarts) == ("succeeded", 0)
        assert tokens_of(job) == expected


@pytest.mark.parametrize("daemon", ["gcs_server", "raylet"])
def test_a_killed_daemon_of_ray_is_a_failed_pipeline(head: HeadProcess, haystack: Haystack, daemon: str) -> None:
    """It is noticed at once, and the next pipeline runs on another Ray."""
    with head.client() as client:
        expected = tokens_of(submit(client, 1, haystack))
        job = submit(client, 1, haystack)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        before = {process.pid for process in marked_processes(head.mark)} - {head.process.pid}
        head.daemon(daemon).kill()
        assert tokens_of(job) == expected
        assert job.data.restarts == 1
        assert head.process.poll() is None
        assert not before & {process.pid for process in marked_processes(head.mark)}
