"""Render the chat template of a model folder, as transformers does, in a process with bounds on what it may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from cluster.text.templates.process import ChatTemplateError, renderer
from cluster.text.tokenizer import TextTokenizer

_MAX_CHARS = 1 << 20  # of a chat template, and of what it may add to the messages


def render_chat(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, Any]], *, enable_thinking: bool | None = None,
    now: datetime | None = None, tools: Sequence[Mapping[str, Any]] | None = None, tool_choice: str | None = None,
) -> str:  # fmt: skip
    """Return the prompt of a conversation under the model's chat template, as transformers renders it.

    Args:
        enable_thinking: None leaves the choice to the template.
        now: what the template's clock says, of any time zone; None reads the clock.
        tools, tool_choice: that the model may call; few templates look at the choice.

    Raises:
        ChatTemplateError: there is no template, or it fails, runs too long, takes too much memory or writes too much.
        RendererBusy: other requests take long.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError(
            "chat_template: the model folder has none: use plain prompts, or add chat_template.jinja"
        )
    if len(template) > _MAX_CHARS:
        raise ChatTemplateError(f"chat_template: {len(template)} characters: at most {_MAX_CHARS}")
    variables: dict[str, Any] = {"messages": [dict(message) for message in messages], "add_generation_prompt": True}
    variables |= {"tools": tools and [*tools], "documents": None, **tokenizer.special_tokens}
    if tool_choice is not None:
        variables["tool_choice"] = tool_choice
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    limit = _MAX_CHARS + 2 * sum(map(len, all_texts([*messages, *(tools or ())])))
    clock = (now or datetime.now()).isoformat()
    return renderer.render({"template": template, "variables": variables, "now": clock, "max_chars": limit})


def all_texts(value: Any) -> Iterator[str]:
    """Yield every text in messages and tools, the names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from all_texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_texts(item)


def render_user_message(
    tokenizer: TextTokenizer, content: str, enable_thinking: bool | None, now: datetime | None = None
) -> str:
    """Return the prompt of one user message: `content` itself for a model without chat template."""
    if tokenizer.chat_template is None:
        return content
    return render_chat(tokenizer, [{"role": "user", "content": content}], enable_thinking=enable_thinking, now=now)
