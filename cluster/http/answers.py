"""What all protocols show of an answer: its text so far, its log-probabilities, and how many tokens it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import JobRecord
from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer


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

    def usage(self, record: JobRecord) -> dict[str, Any]:
        """Return the `usage` of chat and completions."""
        prompt, cached = record.answers[0].prompt_tokens, record.answers[0].cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }


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
