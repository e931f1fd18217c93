"""From documents and questions to prompts: checks before any work, chat templates, reasoning in the answer.

The document always comes first in the user message, so that all questions about it share one token prefix, and
with it the KV that was computed for that prefix.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.common.text_format import one_line
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT, is_document_prompt

_RENDER_SECONDS = 10.0
_MAX_TEMPLATE_CHARS = 1 << 20  # of a chat template, and of what it may add to the messages
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class PromptError(UserError):
    """A document, question or template that cannot become a prompt; one line for the user."""


def check_document(data: bytes, tokenizer: TextTokenizer, max_model_len: int) -> str:
    """The text of an uploaded document, refused if empty, not UTF-8, or too long whatever its tokens are.

    The length check counts bytes only (`TextTokenizer.min_tokens`), so it costs nothing for any size.
    """
    if not data:
        raise PromptError("document: 0 bytes: must have at least one character")
    check_bound(len(data), tokenizer, max_model_len)
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


def check_length(prompt_tokens: int, max_tokens: int, max_model_len: int, *, document_tokens: int = 0) -> None:
    """Refuse a prompt that leaves no room for `max_tokens` of answer.

    With `document_tokens` (the part of the prompt that is the document) the message names the document that fits.
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


def render_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation under the model's chat template, as transformers renders it.

    `enable_thinking` None leaves the choice to the template. Output and time are bounded.
    """
    if tokenizer.chat_template is None:
        raise PromptError("chat_template: the model folder has none: use plain prompts, or add chat_template.jinja")
    if len(tokenizer.chat_template) > _MAX_TEMPLATE_CHARS:
        raise PromptError(f"chat_template: {len(tokenizer.chat_template)} characters: at most {_MAX_TEMPLATE_CHARS}")
    environment = _Environment(time.monotonic)
    variables: dict[str, Any] = {
        **tokenizer.special_tokens,
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None if tools is None else list(tools),
        "documents": None,
    }
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    limit = _MAX_TEMPLATE_CHARS + 2 * sum(len(str(message.get("content", ""))) for message in messages)
    pieces, size = [], 0
    try:
        for piece in environment.from_string(tokenizer.chat_template).generate(variables):
            environment.check_deadline()
            size += len(piece)
            if size > limit:
                raise jinja2.TemplateRuntimeError(f"the output passes {limit} characters")
            pieces.append(piece)
    except _TEMPLATE_FAILURES as error:
        reason = one_line(error, 200) or type(error).__name__
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise PromptError(f"chat_template: cannot be rendered{line}: {reason}") from error
    return "".join(pieces)


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
    """One prompt a question, all with the identical token prefix [chat head + document], tokenised once.

    Special tokens spelt in the document or in a question are ordinary text. A model without chat template gets
    the message alone. Raises PromptError for empty questions, unusable templates, and documents whose prompt
    leaves no room for `max_tokens` of answer.
    """
    if not document:
        raise PromptError("document: 0 characters: must have at least one character")
    _check_template(template)
    check_bound(len(document), tokenizer, max_model_len)  # characters: never more than bytes
    mark_document, mark_question = (f"[{name} {secrets.token_hex(16)}]" for name in ("document", "question"))
    head: str | None = None
    prefix: list[int] = []
    document_tokens = 0
    prompts = []
    for question in questions:
        if not question.strip():
            raise PromptError(f"question: {question!r}: must have text")
        # A question that spells special tokens is kept out of the template too, to be tokenised on its own.
        shown = mark_question if tokenizer.has_special(question) else question
        content = template.replace("{document}", mark_document).replace("{question}", shown)
        this_head, tail = _split_once(_render_user(tokenizer, content, enable_thinking), mark_document)
        if head is None:
            head = this_head
            prefix, document_tokens = _encode_prefix(tokenizer, head, document)
        elif head != this_head:
            raise PromptError("chat_template: the text before the document depends on the question: cannot be shared")
        prompt = prefix + _encode_tail(tokenizer, tail, mark_question, question)
        check_length(len(prompt), max_tokens, max_model_len, document_tokens=document_tokens)
        prompts.append(prompt)
    return prompts


def opens_thinking(tokenizer: TextTokenizer, enable_thinking: bool | None) -> bool:
    """Whether the chat template ends the prompt inside `<think>`, so that the answer starts as reasoning."""
    text = _render_user(tokenizer, "question", enable_thinking)
    return text.rfind("<think>") > text.rfind("</think>")


def _render_user(tokenizer: TextTokenizer, content: str, enable_thinking: bool | None) -> str:
    if tokenizer.chat_template is None:
        return content
    return render_chat(tokenizer, [{"role": "user", "content": content}], enable_thinking=enable_thinking)


def _encode_prefix(tokenizer: TextTokenizer, head: str, document: str) -> tuple[list[int], int]:
    """Ids of head and document, and how many of them are the document's (to within a token at the seam)."""
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
        raise PromptError(f"chat_template: shows the user message {len(parts) - 1} times: must show it exactly once")
    return parts[0], parts[1]


def _check_template(template: str) -> None:
    if not is_document_prompt(template):
        raise PromptError(f"template: {template[:80]!r}: must have {{document}} once and, after it, {{question}} once")


def check_bound(num_bytes: int, tokenizer: TextTokenizer, max_model_len: int) -> None:
    fewest = tokenizer.min_tokens(num_bytes)
    if fewest >= max_model_len:
        most = (max_model_len - 1) * tokenizer.longest_token_bytes
        raise PromptError(
            f"document: {num_bytes} bytes are at least {fewest} tokens, max_model_len is {max_model_len}: "
            f"no document above {most} bytes can fit"
        )


class _GenerationTag(Extension):
    """`{% generation %}` marks training targets; for inference its content is plain."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox transformers renders chat templates in, with a deadline and no giant repetitions."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self._clock = clock
        self._deadline = clock() + _RENDER_SECONDS
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def check_deadline(self) -> None:
        if self._clock() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"takes more than {_RENDER_SECONDS:g} s")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_deadline()
        numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
        sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        if (operator == "**" and max(numbers, default=0) > 1000) or (
            sizes and max(numbers, default=0) * max(sizes) > _MAX_TEMPLATE_CHARS
        ):
            raise jinja2.TemplateRuntimeError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As in transformers: jinja2's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
