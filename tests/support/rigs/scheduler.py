"""A scheduler between fake stages that remember which tokens every KV slot stands for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.request import Request, Status, StopRules
from cluster.scheduler.scheduler import Scheduler
from protos.model import grid
from protos.model.config_json import load_model_spec
from protos.model.grid import is_sparse, largest_cell, next_cut, split
from protos.model.spec import DualChunkSpec, ModelSpec, SparseSpec
from protos.stage.messages import SampledToken, SamplingParams, SequenceSlice, StepPlan
from tests.support.oracles.integrity import check_scheduler
from tests.support.paths import NEEDLE
from workers.model.batch import PageTables

PAGE = 16
PLAIN = load_model_spec(NEEDLE)


def long_spec(
    threshold: int | None = None, cell: int = 64, distance: int = 0, original: int = 0, local: int = 8
) -> ModelSpec:  # fmt: skip
    """A small model of long contexts: sparse above `threshold` tokens (None: dense), DCA chunks of `distance`."""
    dual = DualChunkSpec(distance + local, local, original) if distance else None
    return replace(PLAIN, dual_chunk=dual, sparse=None if threshold is None else SparseSpec(threshold, cell=cell))


def request(
    sequence: int, prompt: Sequence[int], max_tokens: int = 3, stops: Sequence[int] = (), *, pinned_len: int = 0,
    document_id: str = "", **sampling: float,
) -> Request:  # fmt: skip
    rules = StopRules(max_tokens, frozenset(stops))
    return Request(sequence, prompt, SamplingParams(**sampling), rules, pinned_len=pinned_len, document_id=document_id)


SPARSE = long_spec(100, 64)
GRID = long_spec(100, 64, 160, original=64)  # with DCA and a length scale
SCALED = long_spec(None, distance=160, original=64)  # dense DCA with a length scale


def next_token(tokens: Sequence[int]) -> int:
    """A model of one line: the next token depends on all before it."""
    return hash((17, *tokens)) % 1000


def expected_output(prompt: Sequence[int], max_tokens: int, stops: Sequence[int] = ()) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in stops):
        output.append(next_token([*prompt, *output]))
    return output


class FakeStage:
    """Keeps in every slot what KV there depends on, and checks before computing that the context is right.

    A slice that brings no ids continues with what this stage has sampled itself.
    """

    def __init__(self, page_size: int, truth: dict[int, Request], spec: ModelSpec = PLAIN) -> None:
        self.tables = PageTables(page_size)
        self.truth = truth
        self.spec = spec
        self.slots: dict[int, tuple[float, ...]] = {}
        self.last_step = 0
        self.sampled: dict[int, list[int]] = {}

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        assert plan.step == self.last_step + 1, "steps come without gaps"
        self.last_step = plan.step
        self.tables.apply(plan)
        samples, written = [], set()
        for part in plan.slices:
            known = self.truth[part.sequence]
            own = self.sampled.setdefault(part.sequence, [])
            tokens = [*known.prompt, *(known.output if len(known.output) > len(own) else own)]
            tokens = tokens[: part.start + part.length]
            if not part.token_ids:
                assert part.length == 1
                assert part.start == known.num_prompt + len(own) - 1, "it continues its own newest token"
            else:
                assert list(part.token_ids) == tokens[part.start :]
            table = self.tables[part.sequence]
            where = [run.first + i for run in table.runs(0, len(tokens)) for i in range(run.length)]
            for position in range(part.start):
                stored = self.slots.get(where[position])
                assert stored == self.content(part, position, tokens), f"sequence {part.sequence} reads foreign KV"
            for position in range(part.start, len(tokens)):
                assert where[position] not in written
                written.add(where[position])
                self.slots[where[position]] = self.content(part, position, tokens)
            if part.sample is not None:
                assert part.start + part.length == len(tokens)
                assert part.sample.token_index == len(tokens) - known.num_prompt
                samples.append(SampledToken(part.sequence, next_token(tokens)))
                own.append(samples[-1].token_id)
        return samples

    def content(self, part: SequenceSlice, position: int, tokens: Sequence[int]) -> tuple[float, ...]:
        """What the KV of a position depends on: the tokens up to it, or to the end of its cell when it is sparse (the
        last rows decide what is selected), and the length scale."""
        stop, scale = position + 1, 1.0
        if self.spec.sparse and grid.is_sparse(self.spec, position, part.prompt_len):
            stop = grid.next_cut(self.spec, position, part.prompt_len) or stop
            tokens = self.truth[part.sequence].tokens(0, stop)
        if self.spec.dual_chunk:
            scale = self.spec.dual_chunk.length_scale(max(part.scale_len or part.prompt_len, position + 1))
        return (scale, *tokens[:stop])


class Harness:
    """A scheduler between an early stage, which runs a plan at once, and a late one, which runs it before commit."""

    def __init__(
        self, pages: int = 64, page_size: int = PAGE, budget: int = 64, seqs: int = 8, spec: ModelSpec = PLAIN,
        num_stages: int = 1, share_across_lengths: bool = False,
    ) -> None:  # fmt: skip
        self.pool = PagePool(pages)
        self.budget = budget
        self.scheduler = Scheduler(
            self.pool, page_size, budget, seqs, b"root", spec=spec, num_stages=num_stages,
            share_across_lengths=share_across_lengths,
        )  # fmt: skip
        self.requests: dict[int, Request] = {}
        self.early, self.late = (FakeStage(page_size, self.requests, spec) for _ in range(2))
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []

    def count(self, status: Status) -> int:
        return sum(item.status is status for item in self.requests.values())

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.requests[item.sequence] = item
            self.scheduler.prepare(item)
            self.scheduler.add(item)

    def schedule(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.early.execute(plan)
            self.in_flight.append(plan)
            self.plans.append(plan)
        return plan

    def commit(self) -> list[Request]:
        plan = self.in_flight.popleft()
        touched = self.scheduler.commit(plan, self.late.execute(plan))
        check_scheduler(self.scheduler)
        return touched

    def step(self) -> StepPlan | None:
        plan = self.schedule()
        if plan is not None:
            self.commit()
        return plan

    def run(self) -> None:
        while self.step():
            pass


def finish(harness: Harness, *items: Request) -> None:
    """Run requests to their ends and check what they say."""
    harness.add(*items)
    harness.run()
    for item in items:
        assert item.output == expected_output(item.prompt, item.stop.max_tokens)


def check_cells(harness: Harness, spec: ModelSpec) -> None:
    """Every sparse slice is whole cells, every dense one stays within its DCA chunk, steps keep their bound."""
    for plan in harness.plans:
        assert plan.num_tokens <= harness.budget + largest_cell(spec)
        for part in plan.slices:
            stop = part.start + part.length
            for first, end in split(spec, part.start, stop, part.prompt_len):
                if is_sparse(spec, first, part.prompt_len):
                    assert first == 0 or next_cut(spec, first - 1, part.prompt_len) == first
                    assert end == next_cut(spec, first, part.prompt_len)
                else:
                    assert (first, end) == (part.start, stop)


def s2(length: int, spec: ModelSpec = SCALED) -> float:
    """Return the factor that the length scale puts on logits."""
    assert isinstance(spec.dual_chunk, DualChunkSpec)
    return spec.dual_chunk.length_scale(length) ** 2
