"""The object of a response, made of the job behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster.engine.outputs import PrefillProgress
from cluster.http.answers import AnswerScanner, finish_reason
from cluster.http.core.backend import Backend
from cluster.http.responses.names import job_id, not_found, response_id, split_names
from cluster.http.responses.output import OutputWriter
from cluster.jobs.model import JobNotFound, JobRecord, JobState
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService

API = "responses"  # in what is stored of a request
_PAGE = 1000  # tokens read at once
_DECODING_POLL_MS, _WAITING_POLL_MS = 1000, 2000
_POLL_MS = (500, 30_000)  # the least and the most of what follows from the time that is left


def stored_response(service: TenantService, value: str) -> JobRecord:
    """Return the job of a stored response by its id. Raises ApiError: there is none."""
    try:
        record = service.get(job_id(value))
    except JobNotFound as error:
        raise not_found(value) from error
    if not said_of(record).get("store"):
        raise not_found(value)
    return record


def said_of(record: JobRecord) -> dict[str, Any]:
    """Return what a response says of its request, with `store`; empty for a job that is none."""
    request = json.loads(record.spec.request or "{}")
    said: dict[str, Any] = request.get("response", {}) if request.get("api") == API else {}
    return said


def make_writer(backend: Backend, record: JobRecord) -> OutputWriter:
    """Return what turns the tokens of a job into output."""
    source = record.spec.input
    scanner = AnswerScanner(backend.runtime.tool_format, source.tools, source.tool_choice)
    return OutputWriter(record.id, scanner, split_names(said_of(record)["tools"]))


def read_response(service: TenantService, backend: Backend, record: JobRecord) -> dict[str, Any]:
    """Return a response as it is, with its output so far."""
    writer, after = make_writer(backend, record), 0
    while tokens := service.tokens(record.id, after, _PAGE):
        for token in tokens:
            writer.push(token)
        after = tokens[-1].number
    if record.state.is_final:
        writer.end(is_complete(record), not has_answer(record))
    return show_response(record, writer, progress_of(service, record))


def progress_of(service: TenantService, record: JobRecord) -> PrefillProgress | None:
    """Return how far the prompt of a job is read, None while that is not known."""
    return None if record.state.is_final else service.progress(record.id).get(0)


def show_response(
    record: JobRecord, writer: OutputWriter, progress: PrefillProgress | None = None, status: str = ""
) -> dict[str, Any]:
    """Return the object.

    Args:
        status: what it says instead of the state of the job, which it had before.
    """
    status = status or status_of(record)
    is_final = status not in ("queued", "in_progress")
    said = said_of(record)
    return {
        "id": response_id(record.id),
        "object": "response",
        "created_at": int(record.created),
        "completed_at": int(record.finished) if status == "completed" and record.finished is not None else None,
        "status": status,
        "error": _error(record, status),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        **said,
        **_sampling(record),
        "output": writer.output(),
        "usage": _usage(record, writer) if is_final else None,
        "longreach": _progress(record, progress, is_final),
    }


def status_of(record: JobRecord) -> str:
    """Return the status of the response that a job makes."""
    match record.state:
        case JobState.SUCCEEDED:
            return "completed" if is_complete(record) else "incomplete"
        case JobState.FAILED:
            return "failed"
        case JobState.CANCELLED:
            return "cancelled"
    return "in_progress" if has_started(record) else "queued"


def has_started(record: JobRecord) -> bool:
    """Return whether the job has ever run."""
    return record.started is not None or record.state in (JobState.PREFILLING, JobState.DECODING)


def has_answer(record: JobRecord) -> bool:
    """Return whether the job has ended with an answer, whole or not."""
    return record.state is JobState.SUCCEEDED


def is_complete(record: JobRecord) -> bool:
    """Return whether the job has ended with a whole answer."""
    return has_answer(record) and finish_reason(record) == "stop"


def poll_after_ms(record: JobRecord, progress: PrefillProgress | None) -> int | None:
    """Return when a response is worth asking for again; None for one that has ended."""
    if record.state.is_final:
        return None
    if record.state is JobState.DECODING:
        return _DECODING_POLL_MS
    if progress is None or progress.eta_ms is None:
        return _WAITING_POLL_MS
    least, most = _POLL_MS
    return min(max(progress.eta_ms, least), most)


def _error(record: JobRecord, status: str) -> dict[str, Any] | None:
    if status == "failed":
        return {"code": "server_error", "message": record.error or "the job failed"}
    return {"code": "cancelled", "message": "the response was cancelled"} if status == "cancelled" else None


def _sampling(record: JobRecord) -> dict[str, Any]:
    try:
        sampling = record.ask.sampling_params
    except InvalidRequest:
        return {"temperature": None, "top_p": None}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p}


def _usage(record: JobRecord, writer: OutputWriter) -> dict[str, Any]:
    answer = record.answers[0] if record.answers else None
    prompt, cached = (answer.prompt_tokens, answer.cached_tokens) if answer is not None else (0, 0)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": writer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": writer.num_reasoning},
        "total_tokens": prompt + writer.num_tokens,
    }


def _progress(record: JobRecord, progress: PrefillProgress | None, is_final: bool) -> dict[str, Any]:
    """Return how far the prompt is read, and once the answer is there, the recall of its sparse attention."""
    if not is_final or not record.answers or not record.answers[0].prompt_tokens:
        total, cached, processed, eta_ms = (
            (progress.total, progress.cached, progress.processed, progress.eta_ms) if progress else (None,) * 4
        )
        return {"total": total, "cached": cached, "processed": processed, "eta_ms": eta_ms, "recall": None}
    answer = record.answers[0]
    recall = answer.attention.get("held_out_recall") if answer.attention.get("cells") else None
    total = answer.prompt_tokens
    return {"total": total, "cached": answer.cached_tokens, "processed": total, "eta_ms": 0, "recall": recall}
