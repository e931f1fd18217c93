"""One question as the scheduler sees it: tokens, how many of them are computed, and the pages that hold their KV."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.jobs.sampling import OPTIONS
from protos.stage.messages import SampledToken, SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StopRules:
    """When generation ends: `token_ids` (the model's eos ids unless ignored, and the caller's), or `max_tokens`."""

    max_tokens: int
    token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        OPTIONS["max_tokens"].check(self.max_tokens)


@dataclass(slots=True, eq=False)
class Request:
    """`num_computed` tokens have KV; `num_scheduled` counts those in flight as well; a step schedules more of them.

    Prefill, a cached prefix, decoding and recovery are the same: compute tokens until none is left, then sample one.
    """

    sequence: int
    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRules
    arrived: float = 0.0
    priority: int = 0  # higher is admitted earlier
    output: list[int] = field(default_factory=list)
    samples: list[SampledToken] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    pages: tuple[int, ...] = ()
    pages_sent: int = 0  # how many of `pages` the stages know
    hashes: Sequence[bytes] = ()  # of the prompt's pages, as far as they can be shared
    length_key: int = 0  # length the hashes are for, see `cluster.scheduler.prefix_keys`
    scale_len: int = 0  # length whose temperature its prefill uses; 0: its own
    credit: int = 0  # tokens saved up for the next sparse cell
    awaits: bytes | None = None  # the last page another request is about to compute for this one
    published: int = 0  # how many pages are findable by hash
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    samples_in_flight: int = 0  # tokens that steps in flight will sample
    sampled_at: int = 0  # the newest step that samples one
    history_sent: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens not yet scheduled; 0 while the next one is being sampled."""
        return self.num_tokens - self.num_scheduled

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids of positions `start .. stop - 1`, prompt and output as one sequence."""
        split = self.num_prompt
        if stop <= split:
            return list(self.prompt[start:stop])
        return list(self.prompt[start:split]) + self.output[max(start - split, 0) : stop - split]

    def accept(self, sample: SampledToken) -> None:
        """Append a sampled token and see whether generation ends with it."""
        self.output.append(sample.token_id)
        self.samples.append(sample)
        if sample.token_id in self.stop.token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self.stop.max_tokens:
            self.finish_reason = FinishReason.LENGTH
