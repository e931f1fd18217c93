"""Messages between the control plane and the data plane, as frozen dataclasses.

`protos.stage.codec` turns them into protobuf for the wire; a process without generated code (a bare GPU machine that
runs `workers.bench`) uses them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from protos.jobs.logit_bias import TokenBias as TokenBias
from protos.jobs.sampling import SamplingParams as SamplingParams  # the part of a plan that a job asks for


class Span(NamedTuple):
    """A half-open range `[start, stop)` of layers, heads, experts or rows."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The part of the model one process holds; decided by `cluster.config.topology`, obeyed by the workers."""

    stage: int
    num_stages: int
    rank: int
    num_ranks: int
    layers: Span
    heads: Span  # query heads
    kv_heads: Span  # overlaps between ranks when there are more ranks than KV heads
    experts: Span  # empty for a dense model
    intermediate: Span  # columns of dense MLP layers
    vocab: Span  # rows of the embedding and of the output head

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A request to the last stage for one token after the last row of a slice."""

    params: SamplingParams
    token_index: int  # 0 for the first generated token; with the seed it fixes the noise
    history: Sequence[int] = ()  # distinct ids so far; with the first sample of a penalised request, else empty
    mask: bytes = b""  # a bit for each id that may be sampled, the lowest bit of a byte first; empty: all may be
    outputs: Sequence[int] = ()  # ids sampled before; with the first sample under a presence or frequency penalty
    bias: Sequence[TokenBias] = ()  # with the first sample of a request that has one
    is_biased: bool = False  # by `bias`, or by that of the first sample
    banned: Sequence[int] = ()  # ids that are not sampled unless the mask leaves nothing else
    forced: int | None = None  # the token, whatever the logits are


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The tokens of one sequence computed in one step: positions `start .. start + length - 1`."""

    sequence: int
    start: int
    length: int
    prompt_len: int
    # Read by stage 0 only. Empty with length 1: use the token that the last stage sampled for this sequence and sent
    # to stage 0.
    token_ids: Sequence[int]
    new_pages: Sequence[int]  # extend the page table that the stages keep
    num_pages: int  # of the table afterwards; a stage whose table differs refuses the step
    sample: SampleSpec | None = None
    scale_len: int = 0  # length the DCA temperature is taken at; 0: prompt_len
    targets: Sequence[int] = ()  # read by the last stage: tokens behind the first rows, whose log-probability is asked
    top: int = 0  # of each such row the log-probabilities of so many best tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the whole pipeline. Plans are executed in the order of `step`, without gaps."""

    step: int
    slices: tuple[SequenceSlice, ...]
    released: tuple[int, ...] = ()  # sequences whose tables are dropped before this step

    @property
    def num_tokens(self) -> int:
        return sum(s.length for s in self.slices)

    @property
    def is_decode(self) -> bool:
        """Whether every slice is a single token."""
        return all(part.length == 1 for part in self.slices)


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    sequence: int
    token_id: int
    logprob: float | None = None  # of the unmodified distribution (before temperature, penalties and filters)
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CellReport:
    """How one layer of a shard attended in one sparse cell; lists have one entry for each query head of the shard."""

    sequence: int
    layer: int
    first_head: int
    start: int  # first position of the cell
    length: int
    density: Sequence[float]  # visited pairs over causal pairs
    estimated_recall: Sequence[float]  # mass kept of the sampled rows
    held_out_recall: Sequence[float]  # mass kept of other rows of the cell
    dense: Sequence[bool]  # turned dense because of its recall


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """The tokens that one layer has sent to each expert of the model."""

    layer: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepTrace:
    """When a shard worked on a step, and what its links and reductions took.

    Moments are microseconds of its machine's monotonic clock, which all processes of a machine share, and which says
    nothing about that of another machine.
    """

    node: str  # host name of the machine
    began_us: int  # the plan is at hand
    input_us: int  # the input is at hand: between the two it prepared the step and waited for the stage before
    ended_us: int  # computed
    sent_us: int  # handed to the link
    sent_bytes: int  # of hidden states or tokens
    reduce_us: int  # of computing: inside reductions, where it also waits for the other shards of the stage
    reduce_bytes: int  # of the tensors that were reduced
    experts: tuple[ExpertCounts, ...] = ()  # at rank 0, of steps with more than a few rows


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step on one shard. Samples come from rank 0 of the last stage only."""

    step: int
    stage: int
    rank: int
    compute_us: int
    samples: tuple[SampledToken, ...] = ()
    error: str = ""
    cells: tuple[CellReport, ...] = ()
    estimate_us: int = 0  # of compute_us: estimating and selecting of sparse cells
    targets: tuple[SampledToken, ...] = ()  # those of the slices, in order, with log-probabilities
    trace: StepTrace | None = None  # where it was asked for (`StartRequest.trace`)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of loading the weights of one shard; the last message has `ready` or `error`."""

    loaded_bytes: int
    total_bytes: int
    ready: bool = False
    anonymous_growth_bytes: int = 0  # growth of anonymous memory since before loading
    available_bytes: int = 0  # memory left on the device or host
    error: str = ""
    kernel_family: str = ""  # which kernels compute here: KV of another family differs in its last bits
    gpu: str = ""  # identifier of the GPU the shard computes on; empty: on a CPU
    rehearsed_bytes: int = 0  # what the largest step took beside weights and pages; 0: none was rehearsed


@dataclass(frozen=True, slots=True)
class KvBlock:
    """Consecutive tokens of one prompt, whose KV is one block of the store."""

    key: bytes  # SHA-256 of everything its content depends on, tokens before it included
    parent: bytes  # key of the block before; empty for the first
    start: int  # first position
    token_ids: Sequence[int]
    pages: Sequence[int]  # that hold it, in order


@dataclass(frozen=True, slots=True)
class StageProcessSpec:
    """Arguments of a shard's process before it answers: where to listen, its share of the CPU, limits."""

    token: str = field(repr=False)
    socket: str  # path of the Unix socket it listens on
    listen_tcp: bool = False  # also on a TCP port, if stages live on several nodes
    network_interface: str | None = None  # whose address that port is bound to; default: the one Ray uses
    threads: int = 1
    step_timeout_s: float = 3600.0  # for each wait for a neighbour: who hangs is found sooner, by the head
    orphan_timeout_s: float = 180.0  # longer than any other shard may take to start
    certificate: bytes = b""  # PEM, of the key of this process: the TCP port speaks TLS; empty: plain text
    authority: bytes = b""  # PEM, of the launch: whose certificates are accepted
    gpu: int = 0  # index of its GPU among those that the process sees, which is one where Ray has started it


@dataclass(frozen=True, slots=True)
class StageAddress:
    """Where a shard listens, as gRPC addresses."""

    unix: str
    tcp: str  # empty: nowhere
    node: str  # Ray's id of the machine; shards of one node share Unix sockets
    pid: int
