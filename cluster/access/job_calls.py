"""Calls of the job service that all servers make: requests in, messages of jobs.proto out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.access import codec
from cluster.engine.outputs import PrefillProgress
from cluster.jobs.model import DocumentRecord, JobDamaged, JobNotFound, JobRecord
from protos.jobs import jobs_pb2 as pb

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService


def submit(service: TenantService, request: pb.SubmitRequest, max_document_bytes: int) -> JobRecord:
    """Return the job of a request, stored and queued. Raises InvalidRequest, and as `TenantService.submit`.

    Args:
        max_document_bytes: of a text that comes with the request; it is not kept when the request is refused.
    """
    with contextlib.ExitStack() as texts:

        def store_text(text: str) -> str:
            return texts.enter_context(service.keep_text(text, max_document_bytes)).id

        return service.submit(codec.decode_submit(request, service.now(), store_text))


def whole_job(service: TenantService, record: JobRecord) -> pb.Job:
    """Return a job with its tokens and, while it runs, its progress."""
    try:
        tokens = service.tokens(record.id, 0, record.last_event) if record.last_event else ()
    except JobDamaged as damage:
        record, tokens = replace(record, error=record.error or str(damage)), ()
    return codec.encode_job(record, tokens, _progress(service, record))


def list_jobs(service: TenantService, request: pb.ListRequest) -> pb.JobList:
    """Return one page of jobs, without tokens, with the progress of those that run. Raises InvalidRequest."""
    records, cursor = service.jobs(*codec.decode_list(request))
    jobs = [codec.encode_job(one, None, _progress(service, one)) for one in records]
    return pb.JobList(jobs=jobs, next_page_token=cursor)


def _progress(service: TenantService, record: JobRecord) -> Mapping[int, PrefillProgress]:
    try:
        return {} if record.state.is_final else service.progress(record.id)
    except JobNotFound:  # it has ended and was deleted meanwhile
        return {}


def show_document(service: TenantService, record: DocumentRecord) -> pb.Document:
    """Return a document with what is stored of its KV."""
    return codec.encode_document(record, *service.stored_kv([record]).get(record.id, ()))


def list_documents(service: TenantService) -> pb.DocumentList:
    """Return the documents that the caller sees."""
    records = service.documents.list()
    stored = service.stored_kv(records)
    return pb.DocumentList(documents=[codec.encode_document(one, *stored.get(one.id, ())) for one in records])
