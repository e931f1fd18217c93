"""Build the prompts of questions about a document, and check documents before any work.

The document always comes first in the user message, so that all questions about it share one token prefix, and
with it the KV that was computed for that prefix.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from cluster.text.chat_template import render_user_message
from cluster.text.literal_tokenizer import Place
from cluster.text.templates.process import ChatTemplateError
from cluster.text.tokenizer import TextPart, TextTokenizer
from protos.errors import UserError
from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT

_RENDER_SECONDS = 30.0  # for all questions about a document

Document = str | Callable[[Place], Sequence[int]]  # its text, or what returns its ids at a place


class PromptError(UserError):
    """A document or question that cannot become a prompt; one line for the user."""


class PromptTooLong(PromptError):
    """A prompt that does not fit the context, alone or with its answer."""


def check_document(data: bytes, tokenizer: TextTokenizer, max_model_len: int, what: str = "document") -> str:
    """Return the text of a file. Raises PromptError naming `what` it is: empty, not UTF-8, or sure to be too long."""
    if data:
        check_size(len(data), tokenizer, max_model_len, what)
    return decode_document(data, what)


def decode_document(data: bytes, what: str = "document") -> str:
    """Return the text of a file of any length. Raises PromptError: empty, or not UTF-8."""
    if not data:
        raise PromptError(f"{what}: 0 bytes: must have at least one character")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{what}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8 ({error.reason}): "
            f"convert the {what} to UTF-8 text"
        ) from error
    if not text.strip():
        raise PromptError(f"{what}: {len(data)} bytes of white space: must have text")
    return text


def check_size(num_bytes: int, tokenizer: TextTokenizer, max_model_len: int, what: str = "document") -> None:
    """Refuse a text that cannot fit whatever its tokens are (PromptError); costs the same for any size.

    Args:
        what: the text, as the message names it.
    """
    min_tokens = tokenizer.min_tokens(num_bytes, literal=what != "prompt")
    if min_tokens >= max_model_len:
        max_bytes = (max_model_len - 1) * tokenizer.longest_token_bytes
        raise PromptTooLong(
            f"{what}: {num_bytes} bytes are at least {min_tokens} tokens, max_model_len is {max_model_len}: "
            f"no {what} above {max_bytes} bytes can fit"
        )


def check_texts(texts: Iterable[str], tokenizer: TextTokenizer, max_model_len: int, what: str) -> None:
    """Refuse texts that cannot fit together (PromptError), before any of them is rendered or tokenised."""
    check_size(sum(len(text.encode(errors="surrogatepass")) for text in texts), tokenizer, max_model_len, what)


def encode_prompt(text: str, tokenizer: TextTokenizer, max_model_len: int) -> list[int]:
    """Return the token ids of a raw prompt, in which added tokens are what they are; PromptError for one too long."""
    check_texts([text], tokenizer, max_model_len, "prompt")
    return tokenizer.encode(text, add_special=True, max_model_len=max_model_len)


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
        raise PromptTooLong(f"{numbers}: lower max_tokens or raise max_model_len")
    what = "a document" if document_tokens else "a prompt"
    raise PromptTooLong(
        f"{numbers}: {what} of at most {fits} tokens fits; shorten it by {total - max_model_len} tokens"
    )


def build_document_prompts(
    tokenizer: TextTokenizer,
    document: Document,
    questions: Sequence[str],
    template: str = DEFAULT_DOCUMENT_PROMPT,
    *,
    enable_thinking: bool | None,
    max_model_len: int,
    max_tokens: int = 1,
    now: datetime | None = None,
) -> list[list[int]]:
    """Return one prompt a question, all with the identical token prefix [chat head + document].

    Head, document and what follows are tokenised apart, so that the ids of a document can be kept: they do not depend
    on what is asked. A token ends at both seams.

    Added tokens spelt in the document or in a question, special or not, are ordinary text. A model without chat
    template gets the message alone.

    Args:
        template: the user message with `{document}` and, after it, `{question}` (`model.document_prompt`).
        enable_thinking: None leaves the choice to the chat template.
        now: what the clock of the chat template says in all of them; None reads the clock, once.

    Raises PromptError: an empty document or question, or no room for `max_tokens` of answer; ChatTemplateError: the
    template fails, or what it puts before the document depends on the question.
    """
    if document == "":
        raise PromptError("document: 0 characters: must have at least one character")
    if isinstance(document, str):
        check_texts([document], tokenizer, max_model_len, "document")
    for question in questions:
        check_texts([question], tokenizer, max_model_len, "question")
    marks = {name: f"[{name} {secrets.token_hex(16)}]" for name in ("document", "question")}
    content = template.replace("{document}", marks["document"]).replace("{question}", marks["question"])
    render = _Renderer(tokenizer, enable_thinking, now or datetime.now())
    head, tail = _split_once(render(content), marks["document"])
    before, template_end = _split_once(tail, marks["question"])
    prefix = tokenizer.encode_parts([TextPart(head)], add_special=tokenizer.chat_template is None)
    ids = _encode_document(tokenizer, document, tokenizer.place_after(head), max_model_len)
    document_tokens = len(ids)
    prefix += ids
    prompts = []
    for question in questions:
        if not question.strip():
            raise PromptError(f"question: {question!r}: must have text")
        after = template_end
        if not tokenizer.spells_added(question):  # else it is kept out of the template too
            this_head, this_tail = _split_once(render(content.replace(marks["question"], question)), marks["document"])
            if this_head != head:
                problem = "the text before the document depends on the question: cannot be shared"
                raise ChatTemplateError(f"chat_template: {problem}")
            if this_tail.startswith(before + question):  # what follows may depend on the question
                after = this_tail[len(before + question) :]
        parts = [TextPart(before), TextPart(question, literal=True), TextPart(after)]
        prompt = prefix + tokenizer.encode_parts(parts, continues=True, max_model_len=max_model_len)
        check_length(len(prompt), max_tokens, max_model_len, document_tokens=document_tokens)
        prompts.append(prompt)
    return prompts


class _Renderer:
    """Renders the user messages of one call under one clock, and for a bounded time."""

    def __init__(self, tokenizer: TextTokenizer, enable_thinking: bool | None, now: datetime) -> None:
        self._tokenizer = tokenizer
        self._enable_thinking = enable_thinking
        self._now = now
        self._spent_s = 0.0

    def __call__(self, content: str) -> str:
        if self._spent_s > _RENDER_SECONDS:
            raise ChatTemplateError(
                f"chat_template: takes more than {_RENDER_SECONDS:g} s for the questions of one call"
            )
        began = time.monotonic()
        text = render_user_message(self._tokenizer, content, self._enable_thinking, self._now)
        self._spent_s += time.monotonic() - began
        return text


def _encode_document(tokenizer: TextTokenizer, document: Document, place: Place, limit: int) -> Sequence[int]:
    return tokenizer.encode_literal(document, place, limit) if isinstance(document, str) else document(place)


def document_place(
    tokenizer: TextTokenizer, template: str = DEFAULT_DOCUMENT_PROMPT, enable_thinking: bool | None = None
) -> Place:
    """Return the place of a document in its prompts. Raises ChatTemplateError."""
    return tokenizer.place_after(_head(tokenizer, template, enable_thinking))


def head_tokens(tokenizer: TextTokenizer, template: str = DEFAULT_DOCUMENT_PROMPT) -> int:
    """Return how many tokens come before a document in its prompts. Raises ChatTemplateError."""
    head = TextPart(_head(tokenizer, template, None))
    return len(tokenizer.encode_parts([head], add_special=tokenizer.chat_template is None))


def _head(tokenizer: TextTokenizer, template: str, enable_thinking: bool | None) -> str:
    mark = f"[document {secrets.token_hex(16)}]"
    content = template.replace("{document}", mark).replace("{question}", "question")
    return _split_once(_Renderer(tokenizer, enable_thinking, datetime.now())(content), mark)[0]


def _split_once(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        problem = f"shows the user message {len(parts) - 1} times: must show it exactly once"
        raise ChatTemplateError(f"chat_template: {problem}")
    return parts[0], parts[1]
