"""What all protocols show of an answer: its text so far, its log-probabilities, and how many tokens it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import JobRecord
from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.events import AnswerText, ScannedText, ToolEvent
from cluster.text.tools.formats import ToolFormat, make_scanner
from protos.jobs.chat import Tool, ToolChoice


class Answer:
    """One answer of a job, as it comes."""

    def __init__(self) -> None:
        self.tokens: list[OutputToken] = []
        self.num_tokens = self.num_reasoning = 0

    def add(self, tokens: Sequence[OutputToken], keep: bool) -> None:
        """Count tokens, and `keep` them for an answer that is shown at its end."""
        self.num_tokens += len(tokens)
        self.num_reasoning += sum(token.part == "reasoning" for token in tokens)
        if keep:
            self.tokens += tokens

    def usage(self, record: JobRecord, counts_prompt: bool = True) -> dict[str, Any]:
        """Return the `usage` of chat and completions.

        Args:
            counts_prompt: False for an answer whose prompt another one has counted.
        """
        prompt, cached = record.answers[0].prompt_tokens, record.answers[0].cached_tokens
        prompt, cached = (prompt, cached) if counts_prompt else (0, 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }


def total_usage(usages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of numbers, also of those of the mappings inside."""
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            is_group = isinstance(value, Mapping)
            total[name] = total_usage([total.get(name, {}), value]) if is_group else total.get(name, 0) + value
    return total


class AnswerScanner:
    """Splits the text of one answer into text and tool calls; without tools all of it is text.

    Attributes:
        found: text and calls so far.
    """

    def __init__(self, form: ToolFormat, tools: Iterable[Tool], choice: ToolChoice) -> None:
        """
        Args:
            choice: with `one_call`, calls after the first are dropped.
        """
        self.found = ScannedText()
        self._scanner = make_scanner(form, tools, choice)
        self._max_calls = 1 if choice.one_call else None

    def push(self, text: str) -> list[ToolEvent]:
        """Return what the next text of the answer has in it."""
        if self._scanner is not None:
            return self._take(self._scanner.push(text))
        return self._take([AnswerText(text)] if text else [])

    def flush(self) -> list[ToolEvent]:
        """Return what was held back: the answer has ended."""
        return self._take(self._scanner.flush()) if self._scanner is not None else []

    def _take(self, events: Iterable[ToolEvent]) -> list[ToolEvent]:
        kept = [event for event in events if isinstance(event, AnswerText) or self._is_wanted(event.index)]
        self.found.add(kept)
        return kept

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls


def finish_reason(record: JobRecord) -> str:
    """Return why the answer of a job ended: `stop` or `length`."""
    return record.answers[0].finish_reason or "stop"


def spelling(tokenizer: TextTokenizer, token_id: int) -> tuple[str, bytes]:
    """Return a token as text, with U+FFFD for parts of characters, and as the bytes it stands for."""
    entry = tokenizer.id_to_token(token_id)
    if entry is not None and tokenizer.is_byte_level:
        raw = token_bytes(entry)
        return raw.decode(errors="replace"), raw
    text = tokenizer.decode([token_id], skip_special=False)
    return text, text.encode()


def progress_text(progress: PrefillProgress) -> str:
    """Return how far a prompt was read, as a line for people."""
    share = 100 * progress.processed // max(1, progress.total)
    left = f", {progress.eta_ms // 1000} s left" if progress.eta_ms is not None else ""
    return f"read {share} %{left}\n"
