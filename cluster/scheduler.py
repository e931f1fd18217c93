"""Decides every step: which requests run, how many tokens of each, in which blocks. Pure Python, no clock, no I/O.

Order of a step: admit waiting requests while blocks are left, share the token budget, make the plan. A plan is a value;
`commit` takes its result back. Requests reserve all blocks they can ever need when they are admitted (prompt and
max_tokens), so nothing that runs can run out of memory.

Blocks of a request that ends go back at once, even with steps of it in flight: stages execute plans in order, so
whoever gets the blocks next writes them later, and pages that others can find are never among what such a step writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from cluster.block_pool import BlockPool, page_hashes
from cluster.chunking import share_budget
from cluster.request import FinishReason, Request, Status
from protos.errors import UserError
from protos.messages import SampledToken, SampleSpec, SequenceSlice, StepPlan


class DoesNotFit(UserError):
    """A request that could never run, with the numbers."""


class Scheduler:
    """One owner of requests and blocks. `schedule` and `commit` alternate freely: several plans may be in flight."""

    def __init__(
        self, pool: BlockPool, page_size: int, max_num_batched_tokens: int, max_num_seqs: int, cache_root: bytes = b"",
        epoch: int = 1, runs_ahead: bool = False,
    ) -> None:  # fmt: skip
        """Args: with `runs_ahead` the step after a sample is planned before the token is known: its slice has a length
        of 1 and no ids, and the stage, which must be the only one, takes the token it has sampled itself."""
        self._runs_ahead = runs_ahead
        self.pool = pool
        self._page_size = page_size
        self._budget = max_num_batched_tokens
        self._max_seqs = max_num_seqs
        self._root = cache_root
        self._epoch = epoch
        self._step = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._pending: dict[bytes, int] = {}  # pages some running request is about to compute -> its sequence
        self._released: list[int] = []
        self._no_room_for: tuple[int, int] | None = None  # the request at the head of the queue, and when

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def max_tokens_per_step(self) -> int:
        return self._budget

    def blocks_needed(self, request: Request) -> int:
        """Blocks for the prompt and every token it may generate (the last one is never fed back)."""
        tokens = request.num_prompt + request.stop.max_tokens - 1
        return -(-tokens // self._page_size)

    def prepare(self, request: Request) -> None:
        """Check and hash a request. Reads nothing that changes, so it may run on the submitter's thread.

        Raises:
            DoesNotFit: it needs more blocks than the whole pool has.
        """
        needed = self.blocks_needed(request)
        if needed > self.pool.num_blocks:
            held = self.pool.num_blocks * self._page_size
            fits = max(0, held - request.stop.max_tokens + 1)
            raise DoesNotFit(
                f"prompt of {request.num_prompt} tokens with max_tokens {request.stop.max_tokens}: the KV cache holds "
                f"{held} tokens; at most {fits} prompt tokens would fit (or raise kv_cache.bytes)"
            )
        request.hashes = page_hashes(request.prompt, self._page_size, self._root)

    def add(self, request: Request) -> None:
        """Queue a request after `prepare`: behind those of its priority and above."""
        at = len(self._waiting)
        while at and self._waiting[at - 1].priority < request.priority:
            at -= 1
        self._waiting.insert(at, request)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute now."""
        self._admit()
        shares = share_budget(self._budget, [self._remaining(r) for r in self._running])
        slices = tuple(self._slice(r, n) for r, n in zip(self._running, shares, strict=True) if n)
        if not slices:
            return None
        released, self._released = tuple(self._released), []
        self._step += 1
        return StepPlan(self._epoch, self._step, slices, released)

    def commit(self, plan: StepPlan, samples: Iterable[SampledToken]) -> list[Request]:
        """Take the result of a plan; returns the requests it touched. Finished ones have given their blocks back."""
        sampled = {sample.sequence: sample for sample in samples}
        running = {request.sequence: request for request in self._running}
        touched = []
        for part in plan.slices:
            request = running.get(part.sequence)
            if request is None:
                continue  # it ended while this step was in flight
            request.num_computed = part.start + part.length
            self._publish(request)
            if part.sample is not None:
                request.samples_in_flight -= 1
                request.accept(sampled[part.sequence])
            if request.finish_reason is not None:
                self._finish(request)
            touched.append(request)
        return touched

    def stop(self, request: Request, reason: FinishReason) -> None:
        """End a request for a reason of the engine's (stop string, cancel); steps in flight are for nothing."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        request.finish_reason = reason
        self._finish(request)

    def check_integrity(self) -> None:
        """Verify the block pool against the requests that run; raises AssertionError."""
        self.pool.check_integrity(request.blocks for request in self._running)
        alive = {request.sequence for request in self._running}
        assert set(self._pending.values()) <= alive, "pages are pending for requests that do not run"

    # --- internals ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        held_back: list[Request] = []
        while self._waiting and len(self._running) < self._max_seqs:
            request = self._waiting.popleft()
            if self._awaits_prefix(request):
                held_back.append(request)
            elif self._no_room_for == (request.sequence, self.pool.num_releases) or not self._reserve(request):
                self._no_room_for = (request.sequence, self.pool.num_releases)  # until a block comes back
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(held_back))

    def _shareable(self, request: Request) -> Sequence[bytes]:
        """The pages it could adopt: at least one token is computed, to sample from."""
        return request.hashes[: (request.num_tokens - 1) // self._page_size]

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether another request is computing pages this one needs: waiting for them saves the work."""
        if request.awaits is not None and request.awaits in self._pending:
            return True
        request.awaits = None
        hashes = self._shareable(request)
        for page in hashes[len(self.pool.match(hashes)) :]:
            if page not in self._pending:
                break
            request.awaits = page
        return request.awaits is not None

    def _reserve(self, request: Request) -> bool:
        """Adopt the cached prefix, allocate the rest; False (nothing changed) without room."""
        shared = self.pool.match(self._shareable(request))
        missing = self.blocks_needed(request) - len(shared)
        if missing > self.pool.num_available - self.pool.num_unread(shared):
            return False
        self.pool.adopt(shared)
        own = self.pool.allocate(missing)
        assert own is not None, "room was counted"
        request.blocks = shared + own
        request.num_cached = request.num_computed = request.num_scheduled = len(shared) * self._page_size
        request.published = len(shared)
        request.status = Status.RUNNING
        for page in request.hashes[len(shared) :]:
            if not self.pool.knows(page):
                self._pending.setdefault(page, request.sequence)
        self._running.append(request)
        return True

    def _remaining(self, request: Request) -> int:
        """Tokens to schedule; when the next one is still being sampled, it counts if the stage can go on by itself."""
        ahead = request.samples_in_flight
        if self._runs_ahead and ahead and len(request.output) + ahead < request.stop.max_tokens:
            return request.remaining + ahead
        return request.remaining

    def _slice(self, request: Request, length: int) -> SequenceSlice:
        start = request.num_scheduled
        stop = start + length
        sample = None
        if stop >= request.num_tokens:  # beyond: the token in between is in flight
            history = None
            if request.sampling.repetition_penalty != 1.0 and not request.history_sent:
                history = sorted(set(request.tokens(0, stop)))
                request.history_sent = True
            sample = SampleSpec(request.sampling, len(request.output) + request.samples_in_flight, history)
            request.samples_in_flight += 1
        used = -(-stop // self._page_size)
        fresh = request.blocks[request.blocks_sent : used]
        request.blocks_sent = used
        request.num_scheduled = stop
        tokens = request.tokens(start, stop)
        return SequenceSlice(request.sequence, start, length, request.num_prompt, tokens, fresh, used, sample)

    def _publish(self, request: Request) -> None:
        """Make prompt pages findable that are computed now."""
        full = min(request.num_computed // self._page_size, len(request.hashes))
        for index in range(request.published, full):
            page = request.hashes[index]
            self.pool.publish(request.blocks[index], page)
            if self._pending.get(page) == request.sequence:
                del self._pending[page]
        request.published = max(request.published, full)

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self.pool.release(request.blocks)
            self._released.append(request.sequence)
            for page in request.hashes[request.published :]:
                if self._pending.get(page) == request.sequence:
                    del self._pending[page]
        request.blocks = ()
        request.status = Status.FINISHED
