"""Turn a job into token ids: the same ones when it is submitted and when a later head process resumes it."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Iterator

from cluster.common.text_format import one_line
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import InvalidJob, JobSpec, ServiceBusy
from cluster.text.chat_template import ChatTemplateError, opens_thinking
from cluster.text.prompts import check_size
from cluster.text.reasoning import OPEN_TAG
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

_TAIL = 16  # ids at the end of a prompt in which the opening tag is looked for
_AT_A_TIME = 4  # jobs whose texts are in memory to be tokenised; others wait
BUILD_WAIT_S = 20.0  # of a submission, for its turn
_turns = threading.BoundedSemaphore(_AT_A_TIME)


def job_prompts(
    runtime: ClusterRuntime, documents: DocumentStore, spec: JobSpec, wait_s: float | None = None
) -> list[array[int]]:
    """Return the token ids of every question. Sizes are checked before anything is read.

    Args:
        wait_s: how long to wait while the texts of other jobs are tokenised; None for as long as it takes.

    Raises:
        InvalidJob: the prompts cannot be built, or are too long. JobNotFound: the document is gone. ServiceBusy:
            others took too long.
    """
    with _turn(wait_s):
        return _job_prompts(runtime, documents, spec)


@contextlib.contextmanager
def _turn(wait_s: float | None) -> Iterator[None]:
    if not _turns.acquire(timeout=wait_s):
        raise ServiceBusy(f"prompts: {_AT_A_TIME} others have been read for {wait_s:g} s: try again", 5.0)
    try:
        yield
    finally:
        _turns.release()


def check_text(runtime: ClusterRuntime, num_bytes: int, what: str = "document") -> None:
    """Refuse a text that cannot fit, whatever its tokens are, by its bytes alone (InvalidJob)."""
    try:
        check_size(num_bytes, runtime.tokenizer, runtime.deployment.max_model_len, what)
    except UserError as error:
        raise InvalidJob(one_line(error)) from error


def _job_prompts(runtime: ClusterRuntime, documents: DocumentStore, spec: JobSpec) -> list[array[int]]:
    source = spec.input
    try:
        if source.document_id:
            content = documents.read(source.document_id, lambda size: check_text(runtime, size))
            text = runtime.check_document(content)
            prompts = runtime.document_prompts(text, source.questions, spec.ask)
        elif source.messages is not None:
            check_text(runtime, sum(len(text) for _, text in source.messages), "messages")  # never more than bytes
            prompts = [runtime.chat_prompt(source.messages, spec.ask)]
        elif source.prompt is not None:
            check_text(runtime, len(source.prompt), "prompt")
            prompts = [runtime.tokenizer.encode(source.prompt, add_special=True)]
        else:
            prompts = [list(source.token_ids or ())]
        runtime.check_prompts(prompts, spec.ask)
    except UserError as error:
        raise InvalidJob(one_line(error)) from error
    return [array("I", prompt) for prompt in prompts]


def reasoning_opened(tokenizer: TextTokenizer, spec: JobSpec) -> bool:
    """Whether the prompts of a job end inside `<think>`, so that their answers start as reasoning."""
    source = spec.input
    if source.document_id or source.messages is not None:
        with contextlib.suppress(ChatTemplateError):  # the template of another model than the job was submitted to
            return opens_thinking(tokenizer, spec.ask.enable_thinking)
        return False
    if source.prompt is not None:
        return source.prompt.rstrip().endswith(OPEN_TAG)
    ids = list(source.token_ids or ())[-_TAIL:]
    return tokenizer.decode(ids, skip_special=False).rstrip().endswith(OPEN_TAG)
