"""Requests to the engine and what comes back: progress, tokens, results with their timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.engine.attention_report import AttentionSummary
from cluster.scheduler.prefix_keys import Private
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.sampling import AnswerOptions, SamplingParams
from protos.stage.messages import SampledToken, TokenLogprob


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One prompt and how to continue it."""

    prompt: Sequence[int]
    options: AnswerOptions
    priority: int = 0  # higher is admitted earlier
    resume: tuple[SampledToken, ...] = ()  # tokens sampled before, by another engine: generation goes on after them
    question: int = 0  # index of the prompt among those of its caller
    pinned_len: int = 0  # length whose length scale (dual chunk attention) it uses; 0: its own
    cache_salt: str = ""  # prompts share KV with those of the same salt only
    kernel_family: str = ""  # kernels whose stored KV it uses; empty: those of this cluster
    document_id: str = ""  # that it is about: its stored KV is noted there
    private: Private | None = None  # what follows a shared document, which is its owner's alone
    prompt_logprobs: int | None = None  # of the tokens of the prompt, with those of so many best ones; None: not asked
    cache_ttl_s: int = 0  # for so long after its use, what is stored of the prompt is dropped after all else


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Prefill of one prompt in tokens; `processed` includes the `cached` ones, found in memory or loaded."""

    total: int
    cached: int
    processed: int
    eta_ms: int | None


@dataclass(frozen=True, slots=True)
class OutputToken:
    """A sampled token with the text that became certain with it (often empty), as it is stored and streamed.

    `part` is the part of the output after it, "reasoning" or "answer"; `reasoning` and `answer` are what it adds to
    each: together `text` without tags and the white space around them.
    """

    number: int  # consecutive over all questions of one submission, in the order of sampling
    question: int
    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    part: str = "answer"
    reasoning: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `prefill_s` is from the first scheduled step, or the begin of a load of stored KV, to the first token.

    `ttft_s` is from submission.
    """

    queued_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one prompt."""

    token_ids: tuple[int, ...]
    text: str
    reasoning: str | None
    finish_reason: FinishReason
    samples: tuple[SampledToken, ...]
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    error: str = ""
    attention: AttentionSummary | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)  # the values in force, with the seed
    prompt: tuple[SampledToken, ...] = ()  # tokens of the prompt with log-probabilities, none of the first, if asked
    is_own_error: bool = False  # `error` is about this prompt: the pipeline works, and another one would fail as well

    def to_json(self, tokenizer: TextTokenizer | None = None) -> dict[str, Any]:
        """The result as plain data, for `--json`."""
        computed = self.prompt_tokens - self.cached_tokens
        prefill_s = self.timings.prefill_s
        return {
            "token_ids": list(self.token_ids),
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason.value,
            "logprobs": self._logprobs(tokenizer),
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": len(self.token_ids),
                "total_tokens": self.prompt_tokens + len(self.token_ids),
                "cached_tokens": self.cached_tokens,
            },
            "prefill": {
                "total": self.prompt_tokens,
                "cached": self.cached_tokens,
                "processed": self.prompt_tokens if self.token_ids else None,
                "tokens_per_s": round(computed / prefill_s, 1) if prefill_s > 0 else None,
            },
            "timings": {key: round(getattr(self.timings, key), 4) for key in Timings.__slots__},
            "attention": self.attention.to_json() if self.attention else None,
            "sampling": self.sampling.to_json(),
            **({"error": self.error} if self.error else {}),
        }

    def _logprobs(self, tokenizer: TextTokenizer | None) -> list[dict[str, Any]] | None:
        if all(sample.logprob is None for sample in self.samples):
            return None

        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text = tokenizer.decode([token_id], skip_special=False) if tokenizer else None
            return {"token_id": token_id, "token": text, "logprob": logprob}

        return [
            entry(sample.token_id, sample.logprob) | {"top": [entry(i, p) for i, p in sample.top]}
            for sample in self.samples
        ]
