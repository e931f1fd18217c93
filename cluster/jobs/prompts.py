"""Turn a job into token ids: the same ones when it is submitted and when a later head process resumes it."""

from __future__ import annotations

import contextlib
from array import array

from cluster.common.text_format import one_line
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import InvalidJob, JobSpec
from cluster.text.chat_template import ChatTemplateError, opens_thinking
from cluster.text.reasoning import OPEN_TAG
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

_TAIL = 16  # ids at the end of a prompt in which the opening tag is looked for


def job_prompts(runtime: ClusterRuntime, documents: DocumentStore, spec: JobSpec) -> list[array[int]]:
    """Return the token ids of every question.

    Raises:
        InvalidJob: the prompts cannot be built, or are too long. JobNotFound: the document is gone.
    """
    source = spec.input
    try:
        if source.document_id:
            text = runtime.check_document(documents.read(source.document_id))
            prompts = runtime.document_prompts(text, source.questions, spec.ask)
        elif source.messages is not None:
            prompts = [runtime.chat_prompt(source.messages, spec.ask)]
        elif source.prompt is not None:
            prompts = [runtime.text_prompt(source.prompt)]
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
