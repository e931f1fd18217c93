"""Build the prompts of questions about a document, and check documents before any work.

The document always comes first in the user message, so that all questions about it share one token prefix, and
with it the KV that was computed for that prefix.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from cluster.text.chat_template import ChatTemplateError, render_user_message
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT


class PromptError(UserError):
    """A document or question that cannot become a prompt; one line for the user."""


def check_document(data: bytes, tokenizer: TextTokenizer, max_model_len: int) -> str:
    """Return the text of an uploaded document. Raises PromptError: empty, not UTF-8, or too long for any tokens."""
    if not data:
        raise PromptError("document: 0 bytes: must have at least one character")
    check_size(len(data), tokenizer, max_model_len)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"document: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8 ({error.reason}): "
            "convert the document to UTF-8 text"
        ) from error
    if not text.strip():
        raise PromptError(f"document: {len(data)} bytes of white space: must have text")
    return text


def check_size(num_bytes: int, tokenizer: TextTokenizer, max_model_len: int, what: str = "document") -> None:
    """Refuse a document, or `what`, that cannot fit whatever its tokens are (PromptError); cheap for any size."""
    min_tokens = tokenizer.min_tokens(num_bytes)
    if min_tokens >= max_model_len:
        max_bytes = (max_model_len - 1) * tokenizer.longest_token_bytes
        raise PromptError(
            f"{what}: {num_bytes} bytes are at least {min_tokens} tokens, max_model_len is {max_model_len}: "
            f"no {what} above {max_bytes} bytes can fit"
        )


def check_length(prompt_tokens: int, max_tokens: int, max_model_len: int, *, document_tokens: int = 0) -> None:
    """Refuse a prompt that leaves no room for `max_tokens` of answer (PromptError with the numbers and the way out).

    Args:
        document_tokens: tokens of the prompt that are the document's; the message then names the document that fits.
    """
    total = prompt_tokens + max_tokens
    if total <= max_model_len:
        return
    numbers = f"prompt: {prompt_tokens} tokens + max_tokens {max_tokens} = {total}, max_model_len is {max_model_len}"
    fits = max_model_len - max_tokens - (prompt_tokens - document_tokens if document_tokens else 0)
    if fits < 1:
        raise PromptError(f"{numbers}: lower max_tokens or raise max_model_len")
    what = "a document" if document_tokens else "a prompt"
    raise PromptError(f"{numbers}: {what} of at most {fits} tokens fits; shorten it by {total - max_model_len} tokens")


def build_document_prompts(
    tokenizer: TextTokenizer,
    document: str,
    questions: Sequence[str],
    template: str = DEFAULT_DOCUMENT_PROMPT,
    *,
    enable_thinking: bool | None,
    max_model_len: int,
    max_tokens: int = 1,
) -> list[list[int]]:
    """Return one prompt a question, all with the identical token prefix [chat head + document], tokenised once.

    Special tokens spelt in the document or in a question are ordinary text. A model without chat template gets
    the message alone.

    Args:
        template: the user message with `{document}` and, after it, `{question}` (`model.document_prompt`).
        enable_thinking: None leaves the choice to the chat template.

    Raises PromptError: an empty document or question, or no room for `max_tokens` of answer; ChatTemplateError: the
    template fails, or what it puts before the document depends on the question.
    """
    if not document:
        raise PromptError("document: 0 characters: must have at least one character")
    check_size(len(document), tokenizer, max_model_len)  # characters: never more than bytes
    document_mark, question_mark = (f"[{name} {secrets.token_hex(16)}]" for name in ("document", "question"))
    head: str | None = None
    prefix: list[int] = []
    document_tokens = 0
    prompts = []
    for question in questions:
        if not question.strip():
            raise PromptError(f"question: {question!r}: must have text")
        # A question that spells special tokens is kept out of the template too, to be tokenised on its own.
        shown = question_mark if tokenizer.has_special(question) else question
        content = template.replace("{document}", document_mark).replace("{question}", shown)
        this_head, tail = _split_once(render_user_message(tokenizer, content, enable_thinking), document_mark)
        if head is None:
            head = this_head
            prefix, document_tokens = _encode_prefix(tokenizer, head, document)
        elif head != this_head:
            problem = "the text before the document depends on the question: cannot be shared"
            raise ChatTemplateError(f"chat_template: {problem}")
        prompt = prefix + _encode_tail(tokenizer, tail, question_mark, question)
        check_length(len(prompt), max_tokens, max_model_len, document_tokens=document_tokens)
        prompts.append(prompt)
    return prompts


def _encode_prefix(tokenizer: TextTokenizer, head: str, document: str) -> tuple[list[int], int]:
    """Return the ids of head and document, and how many of them are the document's (to within a token at the seam)."""
    plain = tokenizer.chat_template is None
    head_ids = tokenizer.encode(head, add_special=plain) if head or plain else []
    if tokenizer.has_special(document):
        prefix = head_ids + tokenizer.encode(document, literal=True, continues=bool(head))
    else:  # in one piece, so that the seam is tokenised as the model was trained
        prefix = tokenizer.encode(head + document, add_special=plain)
    return prefix, len(prefix) - len(head_ids)


def _encode_tail(tokenizer: TextTokenizer, tail: str, mark: str, question: str) -> list[int]:
    if mark not in tail:
        return tokenizer.encode(tail, continues=True)
    before, after = _split_once(tail, mark)
    ids = tokenizer.encode(before, continues=True)
    ids += tokenizer.encode(question, literal=True, continues=True)
    return ids + tokenizer.encode(after, continues=True)


def _split_once(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        problem = f"shows the user message {len(parts) - 1} times: must show it exactly once"
        raise ChatTemplateError(f"chat_template: {problem}")
    return parts[0], parts[1]
