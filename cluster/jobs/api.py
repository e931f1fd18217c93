"""What the gateway may ask of the job service; the gateway and its tests depend only on this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.engine.outputs import Progress
from cluster.jobs.model import DocumentRecord, JobRecord, JobSpec, JobState, JobToken


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """Prefill of one question of a job."""

    question: int
    progress: Progress


JobEvent = ProgressUpdate | Sequence[JobToken] | JobRecord


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds of the queue and of what is kept. Seconds."""

    max_queued_jobs: int = 256
    max_document_bytes: int = 64 << 20
    result_ttl_s: float = 7 * 86400.0
    document_ttl_s: float = 7 * 86400.0


class JobServiceApi(Protocol):
    """Methods raise the errors of `cluster.jobs.model`; all may be called from any thread."""

    def upload(self, name: str, pieces: Iterable[bytes]) -> DocumentRecord:
        """Store a document; refused early when it can never fit (InvalidJob)."""

    def document(self, document_id: str) -> DocumentRecord: ...

    def documents(self) -> Sequence[DocumentRecord]: ...

    def delete_document(self, document_id: str) -> None: ...

    def submit(self, spec: JobSpec) -> JobRecord:
        """Validate, store and queue. Raises InvalidJob, NotFound (document), Conflict, Busy."""

    def get(self, job_id: str) -> JobRecord: ...

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[JobToken]:
        """Committed tokens with numbers above `after`, in order."""

    def progress(self, job_id: str) -> Mapping[int, Progress]:
        """The newest progress of each question, while the job runs."""

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str
    ) -> tuple[Sequence[JobRecord], str]:
        """Newest first, and the cursor of the next page (empty at the end)."""

    def stream(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """Tokens after `after` in order, those together that are there together, progress in between (at least every
        10 s), a record at every change of state; ends with the record of the ended job. Closing the iterator of an
        attached job cancels the job."""

    def wait(self, job_id: str, timeout_s: float) -> JobRecord: ...

    def cancel(self, job_id: str) -> JobRecord:
        """Cancelling an ended job returns it unchanged."""

    def delete(self, job_id: str) -> None:
        """Forget an ended job (NotAllowedNow while it runs)."""

    def status(self) -> Mapping[str, Any]:
        """Fields of ClusterStatusReply (protos/jobs.proto); `stages` is a list of mappings."""
