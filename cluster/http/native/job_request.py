"""The body of `POST /v1/jobs`: what the Python client's `submit` takes, under the same names."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cluster.client.models import Document
from cluster.client.requests import build_submit
from cluster.http.core.errors import refuse
from cluster.http.native.shapes import NativeModel
from protos.jobs import jobs_pb2 as pb

PARAMS = {"question": "questions", "document.questions": "questions"}  # by the keys of our messages
_INPUT = ("document", "document_id", "questions", "read")


class JobRequest(NativeModel):
    """Exactly one of `document`, `document_id`, `messages`, `prompt` and `token_ids`."""

    document: str | None = Field(None, description="A text, which is kept as a document; for long ones add it first.")
    document_id: str | None = Field(None, description="A stored document.")
    questions: list[str] | None = Field(None, description="About the document, at least one: each has an answer.")
    read: bool = Field(False, description="Ask nothing: read the stored document, so that its KV is there.")
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    prompt: str | None = Field(None, description="Raw, tokenised as it is.")
    token_ids: list[int] | None = None
    max_tokens: int | None = Field(None, description="Of an answer; default 256.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, description="After so many tokens of reasoning it is made to end.")
    min_tokens: int | None = None
    logit_bias: dict[str, Any] | None = Field(None, description="By token id, -100 to 100; at most 1024.")
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = Field(None, description="Higher ones run earlier; default 0.")
    deadline_s: float | None = Field(None, description="Seconds until the job fails by itself.")
    attached: bool | None = Field(None, description="Cancel the job when the stream that follows it ends.")
    idempotency_key: str | None = Field(None, description="Also as the header `Idempotency-Key`.")
    labels: dict[str, str] | None = None


def submit_request(asked: JobRequest, idempotency_key: str | None) -> pb.SubmitRequest:
    """Return what a client asked for, checked as its own library would. Raises ApiError, InvalidRequest.

    Args:
        idempotency_key: of the header; that of the body goes first.
    """
    said = asked.model_dump(exclude_none=True)
    if idempotency_key is not None:
        said.setdefault("idempotency_key", idempotency_key)
    options: Any = {name: value for name, value in said.items() if name not in _INPUT}
    if asked.document_id is not None and asked.document is not None:
        raise refuse("document_id", "must not be given beside document")
    if asked.read and (asked.document_id is None or asked.questions is not None):
        raise refuse("read", "true: must have a document_id and no questions")
    # the library's type of a stored document, of which a request has the id alone
    document = Document(asked.document_id, "", 0, 0.0, 0.0) if asked.document_id is not None else asked.document
    request = build_submit(document, ["(none)"] if asked.read else asked.questions, options)
    if asked.read:
        del request.document.questions[:]
        request.document.read = True
    return request
