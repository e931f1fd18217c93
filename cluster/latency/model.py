"""Predict how long a step takes: the work of its plan, times what a unit of work costs, fitted to measured steps.

The units are those of `step_work`. Steps that only decode and others are summed apart, so that neither is forgotten
while the other is measured, and solved together. Dense rows visit all pairs; for sparse cells the shards report the
share they visited, and a second small fit extrapolates it to longer contexts. The fit serves the predicted end of a
prefill, the hang detector and `longreach plan`; `latency_file` keeps it between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.latency.fit import Costs, Floats, Sums, fit, numbers
from cluster.latency.sparsity import Sparsity, budget_keys
from cluster.latency.stage_times import StageTimes
from cluster.latency.step_work import UNITS, PlainWork, ShardWork, StepCounts, Work, causal_pairs
from cluster.scheduler.chunking import Chunk
from protos.model import grid
from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SequenceSlice, StepPlan

_CHUNK = StepCounts(2048.0, 0.0, 16384.0, 2048.0 * 16384.0, 0.0)  # of a long prompt, to tell stages by
_REFRESH = 16  # steps after which their expected times are those of the newest costs


def visited_share(part: SequenceSlice, reports: Sequence[CellReport]) -> float | None:
    """Return the share of a slice's causal pairs that were visited, over layers and heads; None without reports."""
    visited = pairs = 0.0
    for report in reports:
        if report.sequence == part.sequence and len(report.density):
            weight = causal_pairs(report.start, report.length)
            pairs += weight * len(report.density)
            visited += weight * sum(report.density)
    return visited / pairs if pairs else None


class LatencyModel:
    """Fits the non-negative cost of each unit by recursive least squares with forgetting.

    A step is measured at its slowest shard: for decode steps, of which others answer later, that of the last stage.
    """

    def __init__(
        self, spec: ModelSpec | None = None, works: Sequence[ShardWork] = (), usual: Costs | None = None,
        stages: StageTimes | None = None,
    ) -> None:  # fmt: skip
        """Start with no step.

        Args:
            works: one shard of every stage; without them costs are of tokens, contexts and pairs.
            usual: costs on such hardware, of which only the ratios matter: for what few steps do not tell.
            stages: what learns of the stages' layers, where these are of two kinds.
        """
        self._spec = spec
        self._decode_work: Work = works[-1] if works else PlainWork()
        self._prefill_work: Work = _slowest(works, usual) if works else PlainWork()
        self._sparsity = Sparsity(spec)
        self._prefill, self._decode = Sums(), Sums()
        self._usual = usual
        self.stages = stages
        self._costs: Costs | None = None
        self._reference: Costs | None = None  # costs by which steps are weighed

    @property
    def num_steps(self) -> int:
        """Steps that were measured, in this run and in those that left a file."""
        return self._prefill.steps + self._decode.steps

    def observe(
        self, plan: StepPlan, seconds: float, reports: Sequence[CellReport] = (),
        stage_s: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        """Take the measured time of a step (of the slowest shard), and what the shards report of its sparse grid.

        Args:
            stage_s: seconds of the stages that have answered.
        """
        for part in plan.slices:
            if reports and (share := visited_share(part, reports)):
                self._sparsity.observe(causal_pairs(part.start, part.length) / part.length, share)
        units = self.features(plan, reports)
        expected = sum(x * c for x, c in zip(units, self._reference, strict=True)) if self._reference else seconds
        if self.stages is not None and stage_s and not plan.is_decode:
            self.stages.observe(self.counts(plan, reports), stage_s)
        has_changed = (self._decode if plan.is_decode else self._prefill).add(units, seconds, expected)
        self._costs = None
        if has_changed or self.num_steps < _REFRESH or self.num_steps % _REFRESH == 0:
            self._reference = self.coefficients

    def features(self, plan: StepPlan, reports: Sequence[CellReport] = ()) -> Costs:
        """Return the units of a plan's work on its slowest shard; sparse slices without reports are estimated."""
        work = self._decode_work if plan.is_decode else self._prefill_work
        return tuple(float(unit) for unit in work.units(self.counts(plan, reports)))

    def counts(self, plan: StepPlan, reports: Sequence[CellReport] = ()) -> StepCounts:
        """Return the counts of a plan; sparse slices without reports are estimated."""
        visited = [self._visited(part, reports) for part in plan.slices]
        contexts = [part.start + part.length for part in plan.slices]
        is_sparse = [self._is_sparse(part) for part in plan.slices]
        read = zip(plan.slices, contexts, visited, is_sparse, strict=True)
        return StepCounts(
            plan.num_tokens,
            sum(part.sample is not None for part in plan.slices),
            sum(pairs / part.length if sparse else context for part, context, pairs, sparse in read),
            sum(visited),
            sum(context for context, sparse in zip(contexts, is_sparse, strict=True) if sparse),
        )

    @property
    def coefficients(self) -> Costs:
        """Seconds of each unit; zeros before any step, and without usual costs for units that no step had."""
        if not self.num_steps:
            return (0.0,) * len(UNITS)
        fitted = self._costs  # read once: other threads ask while the engine's thread observes
        if fitted is None:
            fitted = self._costs = fit((self._prefill, self._decode), self._usual)
        return fitted

    def predict(self, plan: StepPlan) -> float:
        """Return the seconds that a step would take."""
        return sum(x * c for x, c in zip(self.features(plan), self.coefficients, strict=True))

    def predict_chunks(self, chunks: Sequence[Chunk]) -> float | None:
        """Return the seconds of steps of one chunk each; None before any step was measured."""
        if not self.num_steps:
            return None
        if not chunks:
            return 0.0
        costs = self.coefficients
        seconds = self._prefill_work.seconds(chunk_counts(chunks, self.keys), costs)
        return float(np.sum(seconds)) * self._prefill.level(costs)

    def keys(self, contexts: Floats) -> Floats:
        """Return the keys that rows of sparse cells visit, by their mean context; all of them before the first cell."""
        return self._sparsity.keys(contexts)

    def to_json(self) -> dict[str, Any]:
        """Return what was learned, as plain data."""
        sums = {"prefill": self._prefill.to_json(), "decode": self._decode.to_json()}
        stages = {} if self.stages is None else {"stages": self.stages.to_json()}
        return {"units": list(UNITS), "visited": self._sparsity.sums.tolist(), **sums, **stages}

    def restore(self, learned: Mapping[str, Any]) -> None:
        """Begin with what another run has learned. Raises ValueError for anything but what `to_json` returns."""
        if learned.get("units") != list(UNITS):
            raise ValueError("it has other units of work")
        sparsity = numbers(learned.get("visited"), (5,))
        prefill, decode = (Sums.from_json(learned.get(kind)) for kind in ("prefill", "decode"))
        if self.stages is not None and "stages" in learned:
            self.stages.restore(learned["stages"])
        self._sparsity.sums, self._prefill, self._decode, self._costs = sparsity, prefill, decode, None
        self._reference = self.coefficients if self.num_steps else None

    def absorb(self, learned: Mapping[str, Any]) -> None:
        """Add the steps of another run, as of `restore`; what was learned of sparse cells stays this one's."""
        other = LatencyModel()
        other.restore(learned)
        self._prefill.absorb(other._prefill)
        self._decode.absorb(other._decode)
        self._costs = None

    def _is_sparse(self, part: SequenceSlice) -> bool:
        return self._spec is not None and grid.is_sparse(self._spec, part.start, part.prompt_len)

    def _visited(self, part: SequenceSlice, reports: Sequence[CellReport]) -> float:
        pairs = causal_pairs(part.start, part.length)
        if not self._is_sparse(part):
            return pairs
        share = visited_share(part, reports)
        if share is not None:
            return share * pairs
        return part.length * float(self._sparsity.keys(np.array(pairs / part.length)))


def _slowest(works: Sequence[ShardWork], usual: Costs | None) -> ShardWork:
    """Return the work of the last of the stages that have most to do in a chunk: by usual costs, else by layers."""
    if usual is None:
        return max(reversed(works), key=lambda work: work.layers)
    return max(reversed(works), key=lambda work: work.seconds(_CHUNK, usual))


def chunk_counts(chunks: Sequence[Chunk], keys: Callable[[Floats], Floats]) -> StepCounts:
    """Return the counts of steps of one chunk each, of which none is sampled; `keys` as of `LatencyModel.keys`."""
    starts, stops, sparse = (np.array(column, np.float64) for column in zip(*chunks, strict=True))
    lengths = stops - starts
    contexts = starts + (lengths + 1) / 2
    visited = lengths * np.where(sparse > 0, keys(contexts), contexts)
    read = np.where(sparse > 0, visited / lengths, stops)
    return StepCounts(lengths, np.zeros_like(starts), read, visited, sparse * stops)


def counts_of(spec: ModelSpec, steps: Sequence[Chunk], keys: Callable[[Floats], Floats] | None) -> StepCounts:
    """Return the counts of steps of one chunk each, of which the last is sampled."""
    counts = chunk_counts(steps, keys or (lambda contexts: budget_keys(spec, contexts)))
    samples = np.zeros(len(steps))
    samples[-1] = 1.0
    return counts._replace(samples=samples)
