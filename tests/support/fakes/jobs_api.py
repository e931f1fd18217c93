"""A job service in memory, and a gRPC server over it on a loopback port."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc

from cluster.access.audit import AuditLog
from cluster.access.keys import Keys
from cluster.config.schema import SecuritySection, ServerSection
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import (
    DocumentRecord,
    InvalidJob,
    JobAnswer,
    JobRecord,
    JobSpec,
    JobState,
    check_id,
    document_not_found,
    job_not_found,
    new_id,
)
from cluster.jobs.subscriptions import JobEvent, ProgressUpdate
from cluster.jobs.tenants.tenant import ANYONE, Tenant, owned_id
from cluster.server.grpc_server import GrpcServer
from protos.stage.channel import CHANNEL_OPTIONS


class FakeJobService:
    """Jobs stay queued until `finish`; `stream` follows `events`, or makes tokens for ever when `endless`."""

    def __init__(self) -> None:
        self.records: dict[str, JobRecord] = {}
        self.stored: dict[str, DocumentRecord] = {}
        self.contents: dict[str, bytes] = {}
        self.documents = SimpleNamespace(
            get=self.document,
            list=self.list_documents,
            delete=self.delete_document,
            pin=self.pin,
            read=self.read,
        )
        self.batches = SimpleNamespace(unfinished_batches=list, expire_batches=lambda before: 0)
        self.error: Exception | None = None  # raised by every submit
        self.events: list[JobEvent] = []
        self.committed: dict[str, list[OutputToken]] = {}  # what `tokens` gives, instead of made-up ones
        self.endless = False
        self.pulled = 0  # events a stream has taken
        self.closed = threading.Event()  # a stream was closed

    def on_ended(self, callback: Any) -> None:
        pass

    def now(self) -> float:
        return time.time()

    def list_documents(self, owner: str | None = None) -> list[DocumentRecord]:
        return [one for one in self.stored.values() if owner in (None, one.owner) or one.shared]

    def read(self, document_id: str, check_size: object = None) -> bytes:
        return self.contents[document_id]

    def upload(self, name: str, pieces: Iterable[bytes], tenant: Tenant = ANYONE) -> DocumentRecord:
        data = b"".join(pieces)
        document_id = owned_id(tenant.name, f"doc_{hashlib.sha256(data).hexdigest()[:32]}")
        self.contents[document_id] = data
        self.stored[document_id] = DocumentRecord(document_id, name, len(data), 1.0, 2.0, owner=tenant.name)
        return self.stored[document_id]

    def add_document(
        self, name: str, pieces: Iterable[bytes], max_bytes: int, *, max_tokens: int = 0, pinned: bool = False,
        source_hash: str = "", append_to: str = "", tenant: Tenant = ANYONE, shared: bool = False,
    ) -> DocumentRecord:  # fmt: skip
        first = self.contents[self.document(append_to).id] if append_to else b""
        record = self.upload(name, [first, *pieces], tenant)
        record = replace(
            record, scale_len=max_tokens, pinned=pinned, source_hash=source_hash, parent=append_to, shared=shared
        )
        self.stored[record.id] = record
        return record

    def export_document(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
        return iter([self.contents[self.document(document_id).id]])

    def import_document(self, pieces: Iterable[bytes], max_bytes: int, tenant: Tenant = ANYONE) -> DocumentRecord:
        return self.upload("imported", pieces, tenant)

    def pin(self, document_id: str, pinned: bool) -> DocumentRecord:
        self.stored[document_id] = replace(self.document(document_id), pinned=pinned)
        return self.stored[document_id]

    def count_text(self, content: bytes) -> int:
        return len(content.split())

    def stored_kv(self, document_ids: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        return dict.fromkeys(document_ids, (512, 4096))

    def keep_text(
        self, text: str, max_bytes: int, tenant: Tenant = ANYONE
    ) -> contextlib.AbstractContextManager[DocumentRecord]:
        return contextlib.nullcontext(self.upload("", [text.encode()], tenant))

    def document(self, document_id: str) -> DocumentRecord:
        check_id(document_id, "doc")
        if document_id not in self.stored:
            raise document_not_found(document_id)
        return self.stored[document_id]

    def delete_document(self, document_id: str) -> None:
        self.document(document_id)
        del self.stored[document_id]

    def submit(self, spec: JobSpec, tenant: Tenant = ANYONE) -> JobRecord:
        if self.error is not None:
            raise self.error
        record = JobRecord(new_id("job"), JobState.QUEUED, spec, created=1.0, owner=tenant.name)
        self.records[record.id] = record
        return record

    def finish(self, job_id: str) -> JobRecord:
        answer = JobAnswer(0, 7, 3, "stop", "ab", timings={"queued_s": 1.0, "total_s": 2.0})
        record = replace(self.get(job_id), state=JobState.SUCCEEDED, finished=3.0, last_event=2, answers=(answer,))
        self.records[job_id] = record
        return record

    def get(self, job_id: str) -> JobRecord:
        if job_id not in self.records:
            raise job_not_found(job_id)
        return self.records[job_id]

    def owner(self, job_id: str) -> str | None:
        return self.records[job_id].owner if job_id in self.records else None

    def counts(self, owner: str | None = None) -> tuple[int, int]:
        return len([one for one in self.records.values() if owner in (None, one.owner)]), 0

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[OutputToken]:
        if job_id in self.committed:
            return self.committed[job_id][after : after + limit]
        last = self.get(job_id).last_event
        return [OutputToken(n, 0, 64 + n, chr(96 + n)) for n in range(after + 1, min(last, after + limit) + 1)]

    def progress(self, job_id: str) -> Mapping[int, PrefillProgress]:
        return {0: PrefillProgress(100, 10, 20, 5000)}

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str, owner: str | None = None
    ) -> tuple[Sequence[JobRecord], str]:
        if cursor and cursor not in self.records:
            raise InvalidJob("page_token: not one of ours")
        found = [r for r in self.records.values() if (not states or r.state in states) and owner in (None, r.owner)]
        return found[:limit], (found[limit - 1].id if len(found) > limit else "")

    def stream(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        self.get(job_id)
        return self._events(job_id, after)

    def _events(self, job_id: str, after: int) -> Iterator[JobEvent]:
        number = after
        try:
            while self.endless:
                number += 1
                self.pulled += 1
                yield [OutputToken(number, 0, 1, "x" * 100)]
            yield ProgressUpdate(0, PrefillProgress(100, 0, 50, None))
            for event in self.events:
                self.pulled += 1
                yield event
            yield self.finish(job_id)
        finally:
            self.closed.set()

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        until = time.monotonic() + timeout_s
        while not (record := self.get(job_id)).state.is_final and time.monotonic() < until:
            time.sleep(0.005)
        return record

    def cancel(self, job_id: str) -> JobRecord:
        record = self.get(job_id)
        if not record.state.is_final:
            record = self.records[job_id] = replace(record, state=JobState.CANCELLED)
        return record

    def delete(self, job_id: str) -> None:
        self.get(job_id)
        del self.records[job_id]

    def status(self) -> Mapping[str, Any]:
        stages = [{"stage": 0, "rank": 1, "state": "running", "steps_done": 5, "resident_bytes": 1 << 40}]
        return {"model": "fake", "max_model_len": 4096, "queued": 1, "kv_usage": 0.5, "stages": stages}


@contextlib.contextmanager
def serving(
    service: FakeJobService, security: SecuritySection | None = None, *, audit: AuditLog | None = None,
    keys: Keys | None = None, **limits: object,
) -> Iterator[tuple[GrpcServer, str]]:  # fmt: skip
    """A server on a free port and its address."""
    section = ServerSection(**limits)  # type: ignore[arg-type]
    server = GrpcServer(service, section, security or SecuritySection(), 0, keys=keys, audit=audit)  # type: ignore[arg-type]
    address = server.start()
    try:
        yield server, address
    finally:
        server.close(0.0)


@contextlib.contextmanager
def channel_to(address: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[grpc.Channel]:
    """A channel with the options of our clients; certificates are made for localhost."""
    if credentials is None:
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", "localhost")]
        channel = grpc.secure_channel(address, credentials, options=options)
    with channel:
        yield channel


def write_secret(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path
