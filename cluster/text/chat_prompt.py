"""Turn a conversation into token ids, so that only the chat template can write control tokens.

A message may spell a token that was added to the tokenizer by hand, such as `<|im_end|>` or `</think>`. Every such
spelling is marked before the template is rendered: a character that occurs nowhere else is put inside it. Where a mark
is left in the rendered text, the text comes from a message, and is tokenised as ordinary text. So are the descriptions
of tools and the arguments of calls, whose names of fields a template may write between brackets (`<` name `>`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from cluster.text.chat_template import all_texts, render_chat
from cluster.text.reasoning import CLOSE_TAG, OPEN_TAG
from cluster.text.templates.process import ChatTemplateError
from cluster.text.tokenizer import TextPart, TextTokenizer

# In the basic plane, where an escape of JSON has one form; unchanged by case, trimming and normalization.
_PRIVATE_USE = range(0xE000, 0xF900)
_TRIES = 100
_COMPARED = frozenset({"role", "type"})
_FOREIGN = frozenset({"parameters", "arguments"})
_SCHEMA_WORDS = frozenset({
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "description", "title", "default",
    "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "minItems", "maxItems", "uniqueItems", "anyOf", "oneOf", "allOf", "not", "nullable", "examples",
    "additionalProperties", "patternProperties", "definitions", "$defs", "$ref", "$id", "$schema",
})  # fmt: skip

Messages = Sequence[Mapping[str, Any]]


def encode_chat(
    tokenizer: TextTokenizer, messages: Messages, *, enable_thinking: bool | None = None, now: datetime | None = None,
    max_model_len: int | None = None, tools: Messages | None = None, tool_choice: str | None = None,
) -> list[int]:  # fmt: skip
    """Return the token ids of a conversation under the model's chat template.

    They are those of the rendered text, unless a message or a tool spells an added token: that stays text.

    Args:
        tools, tool_choice: as of `render_chat`.
        max_model_len: give up a text that is sure to have more tokens than that.

    Raises as `render_chat` and `TextTokenizer.encode`.
    """
    now = now or datetime.now()

    def render(values: Messages) -> str:
        return render_chat(
            tokenizer, values, enable_thinking=enable_thinking, now=now, tools=marked_tools, tool_choice=tool_choice
        )

    template = tokenizer.chat_template or ""
    own = {template[start:end].strip() for start, end in tokenizer.find_respelt(template)}
    added = [text for text in (*tokenizer.added_texts, *own) if text and not text.isspace()]  # that controls nothing
    marks = _Marks(added, list(all_texts([*messages, *(tools or ())])), template)
    marked, marked_tools = marks.mark(messages), marks.mark(tools)
    rendered = render(marked)
    if marked != messages and any(_has_reasoning(message) for message in messages):
        # The template may take the reasoning of an earlier answer apart by its tags, which it does not find any more.
        expected = render(messages)
        if marks.remove(rendered)[0] != marks.remove(expected)[0]:
            apart = render(marks.mark([_split_reasoning(message, tokenizer) for message in messages]))
            rendered = apart if marks.remove(apart)[0] == marks.remove(expected)[0] else rendered
    text, places = marks.remove(rendered)
    literal = list(marks.spelt_by_messages(text, places)) if places else []
    literal += [span for span in tokenizer.find_respelt(text) if text[slice(*span)].strip() not in own]
    return tokenizer.encode_parts(_parts(text, literal), max_model_len=max_model_len)


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and CLOSE_TAG in str(message["content"])


def _split_reasoning(message: Mapping[str, Any], tokenizer: TextTokenizer) -> Mapping[str, Any]:
    """Return an answer with its reasoning in a field of its own, if the template knows that, else without it."""
    if not _has_reasoning(message):
        return message
    reasoning, *_, answer = str(message["content"]).split(CLOSE_TAG)
    if "reasoning_content" not in (tokenizer.chat_template or ""):
        return {**message, "content": answer}
    reasoning = reasoning.rstrip("\n").split(OPEN_TAG)[-1].lstrip("\n")
    return {"reasoning_content": reasoning, **message, "content": answer.lstrip("\n")}


class _Marks:
    """Marks added tokens that are spelt in text, and finds the marks again."""

    def __init__(self, added: Sequence[str], texts: Sequence[str], template: str) -> None:
        """
        Args:
            added: spellings of the added tokens.
            texts: all that will be marked; no mark occurs in them, nor in the template.
        """
        self._mark = _unused_character(f"{texts!r} {template}")
        longest_first = sorted(added, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._spelling = re.compile(pattern)
        self._any_case = re.compile(pattern, re.IGNORECASE)  # a template may change the case
        lower = [text.lower() for text in added]
        self._beginnings = {text[:size] for text in lower for size in range(1, len(text))}
        self._ends = {text[-size:] for text in lower for size in range(1, len(text))}
        self._longest = max(map(len, added), default=0)
        self._around = _Around(lower, self._any_case.sub("\n", template).lower())
        # one text may begin a token, and another end it
        self._joins = any(map(self._ends_in_part, texts)) and any(map(self._begins_in_part, texts))
        # a filter may have written it for a URL or as JSON, once or several times over
        encoded = "".join(f"%{byte:02x}" for byte in self._mark.encode())
        self._written = re.compile(rf"{self._mark}|{encoded}|\\+u{ord(self._mark):04x}", re.IGNORECASE)

    def mark(self, value: Any, is_foreign: bool = False) -> Any:
        """Return messages or tools, or a part of them, with marks in every text.

        Args:
            is_foreign: names of fields are the caller's: a template looks up those of JSON schema alone.
        """
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {
                self._mark_key(key, is_foreign): self._mark_field(key, item, is_foreign) for key, item in value.items()
            }
        return [self.mark(item, is_foreign) for item in value] if isinstance(value, (list, tuple)) else value

    def _mark_field(self, key: str, value: Any, is_foreign: bool) -> Any:
        """Mark the value of a field; what templates compare is not changed by a part at its end."""
        if key in _COMPARED and isinstance(value, str):
            return self._mark_whole(value)
        if is_foreign and key == "required" and isinstance(value, (list, tuple)):
            return [self._mark_key(item, True) if isinstance(item, str) else self.mark(item, True) for item in value]
        return self.mark(value, is_foreign or key in _FOREIGN)

    def _mark_key(self, key: str, is_foreign: bool) -> str:
        """Mark the name of a field: a foreign one at both ends, as a template may change it before it writes it."""
        ends = self._mark * (is_foreign and key not in _SCHEMA_WORDS)
        return f"{ends}{self._mark_whole(key)}{ends}"

    def remove(self, rendered: str) -> tuple[str, frozenset[int]]:
        """Return a text without its marks, and where they were: before the characters of these indices."""
        pieces = self._written.split(rendered)
        at, marks = 0, set()
        for piece in pieces[:-1]:
            at += len(piece)
            marks.add(at)
        return "".join(pieces), frozenset(marks)

    def spelt_by_messages(self, text: str, marks: frozenset[int]) -> Iterator[tuple[int, int]]:
        """Yield start and end of the added tokens in a text that have a mark inside."""
        for match in self._spelling.finditer(text):
            start, end = match.span()
            inside = range(start + 1, end) if end - start > 1 else range(start, end + 1)
            if not marks.isdisjoint(inside):
                yield start, end

    def _mark_text(self, text: str) -> str:
        """Mark whole spellings, and parts at an end that another text or the template may complete."""
        before, after = self._around.completes(text[: self._longest].lower(), text[-self._longest :].lower(), len(text))
        after = after or (self._joins and self._ends_in_part(text))
        return self._mark * before + self._mark_whole(text) + self._mark * after

    def _begins_in_part(self, text: str) -> bool:
        lower = text[: self._longest].lower()
        return any(lower[:size] in self._ends for size in range(1, self._longest))

    def _ends_in_part(self, text: str) -> bool:
        lower = text[-self._longest :].lower()
        return any(lower[-size:] in self._beginnings for size in range(1, self._longest))

    def _mark_whole(self, text: str) -> str:
        return self._any_case.sub(self._inside, text)

    def _inside(self, match: re.Match[str]) -> str:
        text = match[0]
        return text[0] + self._mark + text[1:] if len(text) > 1 else self._mark + text + self._mark


class _Around:
    """Knows where the template may write one part of an added token and a text the rest."""

    def __init__(self, added: Sequence[str], template: str) -> None:
        """
        Args:
            added: spellings of the added tokens, in lower case, as `template`, which has no whole ones.
        """
        self._ends: set[str] = set()  # what a text may begin with behind the template
        self._beginnings: set[str] = set()  # what it may end with before the template
        self._middles: set[str] = set()  # all of a text between the template
        for text in added:
            sizes = range(1, len(text))
            heads = [size for size in sizes if text[:size] in template]
            tails = [size for size in sizes if text[size:] in template]
            self._ends.update(text[size:] for size in heads)
            self._beginnings.update(text[:size] for size in tails)
            self._middles.update(text[start:end] for start in heads for end in tails if start < end)

    def completes(self, head: str, tail: str, length: int) -> tuple[bool, bool]:
        """Return whether a text of this beginning and end may be part of a token with what is before and after it."""
        is_middle = length == len(head) and head in self._middles
        before = is_middle or any(head[:size] in self._ends for size in range(1, len(head) + 1))
        return before, any(tail[-size:] in self._beginnings for size in range(1, len(tail) + 1))


def _unused_character(used: str) -> str:
    """Return a private character that nobody can guess and that is not used, nor written as an escape of JSON."""
    escapes = used.lower()
    for _ in range(_TRIES):
        mark = chr(secrets.choice(_PRIVATE_USE))
        if mark not in used and f"\\u{ord(mark):04x}" not in escapes:
            return mark
    raise ChatTemplateError("messages: use all characters from U+E000 to U+F8FF: leave one of these private ones out")


def _parts(text: str, literal: Sequence[tuple[int, int]]) -> list[TextPart]:
    """Return the parts of a text of which some, by start and end, are literal."""
    parts: list[TextPart] = []
    done = 0
    for start, end in sorted(literal):
        parts += [TextPart(text[done : max(done, start)]), TextPart(text[max(done, start) : end], literal=True)]
        done = max(done, end)
    return [*parts, TextPart(text[done:])]
