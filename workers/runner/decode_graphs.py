"""Steps that decode as captured graphs: the device gets the hundreds of kernels of a step with one call.

A graph is captured for a number of rows and of splits of attention, and reads and writes memory that stays where it is:
weights, KV, page tables, `DecodeInputs` and `Outputs`. A step takes the smallest graph with room for its rows; those
that are left over are idle. Whatever has no graph runs eagerly: prefill, more rows than `capacity`, shards that reduce
with others, weights that the host unpacks.

Legend: `B` rows of a graph, `M` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from protos.model.grid import is_sparse
from protos.stage.messages import StepPlan
from workers.kernels.device import processors
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV
from workers.model.batch import PageTables
from workers.model.decoder import Decoder
from workers.model.device.inputs import DecodeInputs
from workers.model.device.tables import DeviceTables

MOST_ROWS = 256  # of a graph, which has room for as many rows of logits
# Keys of the longest row of a step up to which its graph has no more splits than so many keys need. A graph cannot
# adapt them, and more splits than necessary are more to merge. With 4 KV heads on 132 multiprocessors only graphs of
# one and two rows differ by it; for 1,000 keys they have 32 splits where 4 would do.
_FEW_KEYS = 8192


class Recorder(Protocol):
    """Captures work on a device."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work`, and return what does the same again with the memory that it has used, whatever is in there."""


class Graph(NamedTuple):
    """A captured graph: its rows, and the splits of their keys."""

    rows: int
    splits: int


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A step that a graph computes."""

    graph: Graph
    count: int  # of its first rows that are those of the step


@dataclass(frozen=True, slots=True)
class Outputs:
    """What graphs compute, at fixed places: hidden states, or at the last stage logits and greedy choices."""

    hidden: torch.Tensor | None = None  # [B, M]
    logits: torch.Tensor | None = None  # [B, V] float32
    chosen: torch.Tensor | None = None  # [2, B] int64: ids, and whether all logits are finite

    def first(self, count: int) -> Outputs:
        """Return those of the first rows; hidden states as a copy, which may still be sent when the next step runs."""
        return Outputs(
            None if self.hidden is None else self.hidden[:count].clone(),
            None if self.logits is None else self.logits[:count],
            None if self.chosen is None else self.chosen[:, :count],
        )


def row_counts(capacity: int) -> list[int]:
    """Return the rows of the graphs for steps of up to `capacity` rows, the most first."""
    return sorted({capacity, *(1 << power for power in range(capacity.bit_length()))}, reverse=True)


class DecodeGraphs:
    """The graphs of one shard; they are captured once, after its weights and its KV have their memory."""

    def __init__(
        self, decoder: Decoder, kv: PagedKV, tables: DeviceTables, capacity: int, device: torch.device,
        recorder: Recorder,
    ) -> None:  # fmt: skip
        """Args: `capacity` is the most rows that a graph has."""
        spec, shard = decoder.spec, decoder.shard
        self._decoder, self._kv, self._recorder = decoder, kv, recorder
        self._inputs = DecodeInputs(spec, kv, tables, capacity, device)
        shape = capacity, spec.hidden_size
        self._hidden = None if shard.is_first else torch.zeros(shape, dtype=decoder.dtype, device=device)
        if shard.is_last:
            logits = torch.zeros(capacity, spec.vocab_size, device=device)
            self._outputs = Outputs(None, logits, torch.zeros(2, capacity, dtype=torch.int64, device=device))
        else:
            self._outputs = Outputs(torch.zeros(shape, dtype=decoder.dtype, device=device))
        self._processors = processors(device)
        most = kv.num_pages * kv.page_size
        self._keys = min(most, _FEW_KEYS), most  # up to which a graph has no more splits than they need
        self._replays: dict[Graph, Callable[[], None]] = {}

    @property
    def graphs(self) -> list[Graph]:
        """The graphs that were captured."""
        return list(self._replays)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all graphs, large ones first, whose memory the others share; it writes no KV.

        Raises:
            RuntimeError: something in a step cannot be captured, or memory is short.
        """
        for rows in row_counts(self._inputs.capacity):
            for keys in self._keys:
                graph = self._graph(rows, keys)
                if graph not in self._replays:
                    self._replays[graph] = self._recorder.capture(functools.partial(self._compute, graph))

    def prepare(self, plan: StepPlan, tables: PageTables) -> GraphStep | None:
        """Note the rows of a step; returns None if it must run eagerly.

        Args:
            tables: to which the plan was applied.

        Raises:
            PlanMismatch: it does not continue what this shard has seen.
        """
        if not self._supports(plan):
            return None
        count = len(plan.slices)
        rows = min(rows for rows in row_counts(self._inputs.capacity) if rows >= count)
        longest = self._inputs.fill(plan.slices, tables)
        few, most = self._keys
        return GraphStep(self._graph(rows, few if longest <= few else most), count)

    def run(self, step: GraphStep, tokens: Sequence[int], hidden: torch.Tensor | None) -> Outputs:
        """Compute the step that was prepared last.

        Args:
            tokens: its input at the first stage, else none.
            hidden: `[count, M]` from the previous stage, on the device.

        Returns:
            Its rows, good until the next step.
        """
        self._inputs.upload(tokens)
        if self._hidden is not None:
            assert hidden is not None, "a later stage needs activations"
            self._hidden[: step.count].copy_(hidden)
        self._replays[step.graph]()
        self._decoder.count_replay()
        return self._outputs.first(step.count)

    def _supports(self, plan: StepPlan) -> bool:
        spec = self._decoder.spec
        return (
            plan.is_decode
            and len(plan.slices) <= self._inputs.capacity
            and self._inputs.is_in_place
            and self._decoder.on_experts is None
            and not any(part.targets or is_sparse(spec, part.start, part.prompt_len) for part in plan.slices)
        )

    def _graph(self, rows: int, keys: int) -> Graph:
        from workers.kernels.triton.layer.decode import count_splits

        return Graph(rows, count_splits(rows, self._kv.layer(0).keys.shape[0], self._processors, keys))

    def _compute(self, graph: Graph) -> None:
        """Do the work of a graph: nothing in here reads results, or takes memory by what they are."""
        decoder, inputs, rows = self._decoder, self._inputs, graph.rows
        x = decoder.embed(inputs.tokens(rows)) if self._hidden is None else self._hidden[:rows]
        attention = inputs.rows(rows, graph.splits)
        x = decoder.layers(x, decoder.prepare_rows(inputs.positions(rows), inputs.slots(rows), attention, self._kv))
        outputs = self._outputs
        if outputs.hidden is not None:
            outputs.hidden[:rows] = x
        if outputs.logits is not None and outputs.chosen is not None:
            outputs.logits[:rows] = decoder.logits(x)
            outputs.chosen[:, :rows] = calls.choose_greedily(outputs.logits[:rows])
