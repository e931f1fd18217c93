"""A scheduler between fake stages, with a store that remembers what KV it was given; a test says when it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.scheduler.request import Request, Status
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.stored_prefix import Load, LookUp, Offer
from protos.stage.messages import KvBlock, StepPlan
from tests.support.oracles.integrity import check_pool, check_prefixes
from tests.support.rigs.scheduler import PAGE, Harness

BLOCK = 32
Content = list[tuple[float, ...]]
GARBAGE = (-1.0,)


class StoredHarness(Harness):
    """`disk` has the KV of each stored block, position by position. Nothing is answered until a test says so."""

    def __init__(self, *, block: int = BLOCK, disk: dict[bytes, Content] | None = None, **options: Any) -> None:
        super().__init__(**options)
        budget, seqs, spec = self.budget, options.get("seqs", 8), self.scheduler.spec
        self.scheduler = Scheduler(
            self.pool, PAGE, budget, seqs, b"root", spec=spec, num_stages=options.get("num_stages", 1),
            block_tokens=block, share_across_lengths=options.get("share_across_lengths", False),
        )  # fmt: skip
        self.disk = {} if disk is None else disk
        self.look_ups: list[LookUp] = []
        self.loads: list[Load] = []
        self.offers: list[Offer] = []
        self.writes: list[tuple[Offer, tuple[int, ...]]] = []  # under way: their pages are pinned
        self.num_loaded = 0

    def collect(self) -> None:
        """Take what the scheduler wants of the store, as the engine does after every event."""
        self.scheduler.admit()
        self.look_ups += self.scheduler.stored.take_look_ups()
        self.loads += self.scheduler.take_loads()

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        self.collect()
        return plan

    def commit(self) -> list[Request]:
        plan = self.in_flight.popleft()
        touched = self.scheduler.commit(plan, self.late.execute(plan))
        for request in touched:
            self.offers += self.scheduler.stored.take_complete(request)
        self.check()
        self.collect()
        return touched

    def answer_look_up(self, at: int = 0) -> None:
        look_up = self.look_ups.pop(at)
        found = next((n for n, key in enumerate(look_up.keys) if key not in self.disk), len(look_up.keys))
        self.scheduler.stored.found(look_up, found)
        self.collect()

    def answer_load(self, at: int = 0, fails_after: int | None = None) -> None:
        """Read the blocks of a load; one that fails leaves garbage in its pages."""
        load, read = self.loads.pop(at), 0
        for block in load.blocks:
            content = self.disk.get(block.key)
            if content is None or read == fails_after:
                self.fill(block, [GARBAGE] * BLOCK)
                break
            self.fill(block, content)
            read += 1
        self.num_loaded += read
        self.scheduler.loaded(load, read)
        self.check()
        self.collect()

    def fill(self, block: KvBlock, content: Content) -> None:
        for index, page in enumerate(block.pages):
            for offset in range(PAGE):
                for stage in (self.early, self.late):
                    stage.slots[page * PAGE + offset] = content[index * PAGE + offset]

    def begin_write(self) -> None:
        """Take the next offer; it is dropped if its pages are gone."""
        offer = self.offers.pop(0)
        if (pages := self.pool.pin(offer.hashes)) is not None:
            self.writes.append((offer, pages))

    def end_write(self, at: int = 0) -> None:
        offer, pages = self.writes.pop(at)
        slots = [page * PAGE + offset for page in pages for offset in range(PAGE)]
        content = [self.late.slots[slot] for slot in slots]
        assert GARBAGE not in content
        self.disk.setdefault(offer.key, content)
        assert self.disk[offer.key] == content, "one key, two contents"
        self.pool.mark_stored(offer.block(pages))
        self.pool.unpin(pages)
        self.check()
        self.collect()

    def store_all(self) -> None:
        while self.offers:
            self.begin_write()
        while self.writes:
            self.end_write()

    def run(self) -> None:
        """Answer everything and run everything to its end."""
        while any((self.look_ups, self.loads, self.in_flight)) or self.count(Status.FINISHED) < len(self.requests):
            while self.look_ups:
                self.answer_look_up()
            while self.loads:
                self.answer_load()
            while self.in_flight:
                self.commit()
            if not self.step() and not self.look_ups and not self.loads:
                assert self.count(Status.FINISHED) == len(self.requests), "it is stuck"

    def check(self) -> None:
        loading = {sequence: load.request for sequence, load in self.scheduler._loading.items()}
        requests = (*self.scheduler._running.values(), *loading.values())
        check_pool(self.pool, (request.pages for request in requests))
        check_prefixes(self.scheduler._prefixes, {*self.scheduler._running, *loading})


def submit_and(harness: StoredHarness, *items: Request, then: Callable[[], None] | None = None) -> None:
    """Run requests to their ends, store everything, and check that no page stays behind."""
    harness.add(*items)
    harness.run()
    harness.store_all()
    assert harness.pool.usage == 0
    if then is not None:
        then()
