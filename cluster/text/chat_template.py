"""Render the chat template of a model folder, as transformers does, in a sandbox with bounds on time and output."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.common.text_format import one_line
from cluster.text.reasoning import CLOSE_TAG, OPEN_TAG
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

_RENDER_SECONDS = 10.0
_MAX_CHARS = 1 << 20  # of a chat template, and of what it may add to the messages
_MAX_EXPONENT = 1000
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplateError(UserError):
    """A chat template that is missing, cannot be rendered, or does not show the messages as it must."""


def render_chat(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, Any]], *, enable_thinking: bool | None = None
) -> str:
    """Return the prompt of a conversation under the model's chat template, as transformers renders it.

    `enable_thinking` None leaves the choice to the template. Raises ChatTemplateError: there is no template, or it
    fails, runs too long or writes too much.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError(
            "chat_template: the model folder has none: use plain prompts, or add chat_template.jinja"
        )
    if len(template) > _MAX_CHARS:
        raise ChatTemplateError(f"chat_template: {len(template)} characters: at most {_MAX_CHARS}")
    variables: dict[str, Any] = {"messages": [dict(message) for message in messages], "add_generation_prompt": True}
    variables |= {"tools": None, "documents": None, **tokenizer.special_tokens}
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    limit = _MAX_CHARS + 2 * sum(len(str(message.get("content", ""))) for message in messages)
    environment = _Sandbox()
    pieces, size = [], 0
    try:
        for piece in environment.from_string(template).generate(variables):
            environment.check_deadline()
            size += len(piece)
            if size > limit:
                raise jinja2.TemplateRuntimeError(f"the output passes {limit} characters")
            pieces.append(piece)
    except _FAILURES as error:
        reason = one_line(error, 200) or type(error).__name__
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ChatTemplateError(f"chat_template: cannot be rendered{line}: {reason}") from error
    return "".join(pieces)


def render_user_message(tokenizer: TextTokenizer, content: str, enable_thinking: bool | None) -> str:
    """Return the prompt of one user message: `content` itself for a model without chat template."""
    if tokenizer.chat_template is None:
        return content
    return render_chat(tokenizer, [{"role": "user", "content": content}], enable_thinking=enable_thinking)


def opens_thinking(tokenizer: TextTokenizer, enable_thinking: bool | None) -> bool:
    """Return whether the chat template ends the prompt inside `<think>`, so that the answer starts as reasoning."""
    text = render_user_message(tokenizer, "question", enable_thinking)
    return text.rfind(OPEN_TAG) > text.rfind(CLOSE_TAG)


class _GenerationTag(Extension):
    """`{% generation %}` marks training targets; for inference its content is plain."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment transformers renders chat templates in, with a deadline and without huge repetitions."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self._deadline = time.monotonic() + _RENDER_SECONDS
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"takes more than {_RENDER_SECONDS:g} s")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_deadline()
        largest = max((abs(x) for x in (left, right) if isinstance(x, int | float)), default=0)
        length = max((len(x) for x in (left, right) if isinstance(x, str | list | tuple)), default=0)
        if (operator == "**" and largest > _MAX_EXPONENT) or largest * length > _MAX_CHARS:
            raise jinja2.TemplateRuntimeError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as transformers does: jinja2's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
