"""The state of one request: its tokens, how many are computed, and the pages that hold their KV."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.scheduler.prefix_keys import OWN, Origin
from protos.stage.messages import SampledToken, SamplingParams, TokenBias


class Status(enum.Enum):
    """The stages of a request's life."""

    WAITING = "waiting"
    LOADING = "loading"  # it has its pages, and stored KV is being read into them
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StopRules:
    """When generation ends: after `max_tokens` (at least 1), or with one of `token_ids`.

    `token_ids` are the model's end-of-sequence ids, unless they are ignored, and the caller's. None of them is sampled
    among the first `min_tokens` tokens.
    """

    max_tokens: int
    token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its answer.

    Of the tokens present (prompt and output), the first `num_computed` have KV and the first `num_scheduled` are
    computed or in flight: num_cached <= num_computed <= num_scheduled.
    """

    sequence: int
    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRules
    priority: int = 0  # higher is admitted earlier
    pinned_len: int = 0  # length whose length scale it uses, that of the longest prompt of its job; 0: its own
    origin: Origin = OWN  # with whose prompts it shares KV
    document_id: str = ""  # that the prompt is about
    logit_bias: Sequence[TokenBias] = ()
    free_until: int | None = None  # tokens of the answer from this index on need the one before; None: none does
    prompt_logprobs: int | None = None  # of the prompt, with so many best ones: all of it is computed; None: not asked
    cache_ttl_s: int = 0  # for so long after its use, what is stored of the prompt is dropped after all else
    mask: bytes = b""  # of the next token, see `SampleSpec`
    forced: int | None = None  # the next token, likewise
    is_private: bool = False  # its document is gone: nobody finds what it computes from now on
    output: list[int] = field(default_factory=list)
    samples: list[SampledToken] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None

    # Progress, kept by the scheduler
    num_cached: int = 0  # adopted with the prefix
    num_computed: int = 0
    num_scheduled: int = 0
    pages: tuple[int, ...] = ()
    deficit: int = 0  # tokens carried over to the next sparse cell, see `cluster.scheduler.chunking`
    samples_in_flight: int = 0  # tokens that steps in flight will sample
    sampled_at: int = 0  # the newest step that samples one; 0: none yet

    # Shared prefix, kept by `cluster.scheduler.prefix_cache`
    hashes: Sequence[bytes] = ()  # of the prompt's pages that can be shared, under the length scale of `length_key`
    length_key: int = 0
    scale_len: int = 0  # length whose length scale its rows use; 0: its own
    num_published: int = 0  # how many of its first pages others can find
    awaited: bytes | None = None  # hash of the last page that another request is about to compute for this one

    # Stored KV, kept by `cluster.scheduler.stored_prefix`
    block_keys: Sequence[bytes] = ()  # of the prompt's blocks, under the length scale of `length_key`
    num_found: int | None = None  # how many of the first are stored; None: not known
    is_looked_up: bool = False  # somebody is finding out
    num_offered: int = 0  # how many of the first were offered to the store

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens present: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens present that are not scheduled; 0 while the next one is being sampled."""
        return self.num_tokens - self.num_scheduled

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next token can be planned before those in flight are known."""
        return self.free_until is None or len(self.output) + self.samples_in_flight < self.free_until

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the ids of positions `start .. stop - 1`, prompt and output as one sequence."""
        split = self.num_prompt
        if stop <= split:
            return list(self.prompt[start:stop])
        return list(self.prompt[start:split]) + self.output[max(start - split, 0) : stop - split]

    def accept(self, sample: SampledToken) -> None:
        """Append a sampled token; sets `finish_reason` if generation ends with it."""
        self.output.append(sample.token_id)
        self.samples.append(sample)
        if sample.token_id in self.stop.token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self.stop.max_tokens:
            self.finish_reason = FinishReason.LENGTH
