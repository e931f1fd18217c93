"""What a job asks, as token ids: the same when it is submitted and when a later head takes it up again."""

from __future__ import annotations

from array import array

from cluster.documents import Documents
from cluster.jobs import InvalidJob, JobSpec
from cluster.session import Session
from protos.errors import UserError


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
        raise InvalidJob(" ".join(str(error).split())) from error
    return [array("I", prompt) for prompt in prompts]
