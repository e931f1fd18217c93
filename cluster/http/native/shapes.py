"""Jobs, documents, events and the cluster as JSON: the objects that the command line prints with `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.client.models import ClusterStatus, Document, JobData
from cluster.engine.outputs import OutputToken
from cluster.http.core.sse import event
from cluster.jobs.subscriptions import ProgressUpdate
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message


class NativeModel(BaseModel):
    """A request of our own routes. Fields that nobody knows are refused: they are misspelt."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class JobPage(BaseModel):
    """Some jobs, the newest first, without token lists."""

    jobs: list[JobData]
    next_page_token: str


class DocumentPage(BaseModel):
    """All documents."""

    documents: list[Document]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    deleted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterObject(ClusterStatus):
    """The cluster, and where it was asked."""

    address: str


def job_object(message: pb.Job) -> dict[str, Any]:
    """Return a job."""
    return read_message(JobData, message).to_json()


def document_object(message: pb.Document) -> dict[str, Any]:
    """Return a document."""
    return asdict(read_message(Document, message))


def cluster_object(status: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Return the cluster's status, with the address that it was asked at."""
    return asdict(read_message(ClusterStatus, pb.ClusterStatusReply(**status))) | {"address": address}


def progress_event(update: ProgressUpdate) -> bytes:
    """Return how far a prompt was read, as an event."""
    return event({"event": "progress"} | asdict(update), "progress")


def token_events(tokens: Sequence[OutputToken]) -> bytes:
    """Return an event for each token; its id is the number of the token, after which a stream can begin again."""
    return b"".join(
        event({"event": "token", "question": token.question, "token": _token(token), "number": token.number}, "token",
              token.number)
        for token in tokens
    )  # fmt: skip


def _token(token: OutputToken) -> dict[str, Any]:
    return {
        "token_id": token.token_id, "text": token.text, "logprob": token.logprob, "top": token.top,
        "part": token.part, "reasoning": token.reasoning, "answer": token.answer,
    }  # fmt: skip


def job_event(message: pb.Job, is_last: bool) -> bytes:
    """Return a job in a new state, as an event; the last one of a stream has the ended job."""
    name = "ended" if is_last else "state"
    return event({"event": name, "job": job_object(message)}, name)
