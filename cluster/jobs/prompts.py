"""Turn a job into token ids: the same when it is submitted and when a later head process resumes it."""

from __future__ import annotations

from array import array

from cluster.common.text_format import one_line
from cluster.engine.runtime import Session
from cluster.jobs.documents import Documents
from cluster.jobs.model import InvalidJob, JobSpec
from cluster.text.chat_template import opens_thinking
from cluster.text.reasoning import OPEN_TAG
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

_TAIL = 16  # ids at the end of a prompt that can hold the opening tag


def job_prompts(session: Session, documents: Documents, spec: JobSpec) -> list[array[int]]:
    """Token ids of every question. Raises InvalidJob, or NotFound (the document)."""
    given = spec.input
    try:
        if given.document_id:
            text = session.check_document(documents.read(given.document_id))
            prompts = session.document_prompts(text, given.questions, spec.ask)
        elif given.messages is not None:
            prompts = [session.chat_prompt(given.messages, spec.ask)]
        elif given.prompt is not None:
            prompts = [session.tokenizer.encode(given.prompt, add_special=True)]
        else:
            prompts = [list(given.token_ids or ())]
        session.check_prompts(prompts, spec.ask)
    except UserError as error:
        raise InvalidJob(one_line(error)) from error
    return [array("I", prompt) for prompt in prompts]


def reasoning_opened(tokenizer: TextTokenizer, spec: JobSpec) -> bool:
    """Whether the prompts of a job end inside `<think>`, so that their answers start as reasoning."""
    given = spec.input
    if given.document_id or given.messages is not None:
        return opens_thinking(tokenizer, spec.ask.enable_thinking)
    if given.prompt is not None:
        return given.prompt.rstrip().endswith(OPEN_TAG)
    ids = list(given.token_ids or ())[-_TAIL:]
    return tokenizer.decode(ids, skip_special=False).rstrip().endswith(OPEN_TAG)
