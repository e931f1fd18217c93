"""Decides every step: which requests run, how many tokens of each, in which pages. Pure Python, no clock, no I/O.

Order of a step: admit waiting requests while pages are left, share the token budget, make the plan. A plan is a value;
`commit` takes its result back. Requests reserve all pages they can ever need when they are admitted (prompt and
max_tokens), so nothing that runs can run out of memory. Steps are cut where the attention of the model allows it
(`chunking`), and prefixes are shared where KV does not depend on who computed it (`prefix_keys`).

Pages of a request that ends go back at once, even with steps of it in flight: stages execute plans in order, so
whoever gets the pages next writes them later, and pages that others can find are never among what such a step writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from cluster.scheduler.chunking import Chunk, Stand, chunks, cut, share_budget
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.prefix_keys import PrefixKeys
from cluster.scheduler.request import FinishReason, Request, Status
from protos.errors import UserError
from protos.model import grid
from protos.model.spec import ModelSpec
from protos.stage.messages import SampledToken, SampleSpec, SequenceSlice, StepPlan

# Pages of another length scale are adopted only when they are this share of the prompt: for a document, not for the
# few words every prompt begins with.
_FOREIGN_SHARE = 0.25


class DoesNotFit(UserError):
    """A request that could never run, with the numbers."""


class Scheduler:
    """One owner of requests and pages. `schedule` and `commit` alternate freely: several plans may be in flight."""

    def __init__(
        self, pool: PagePool, page_size: int, max_num_batched_tokens: int, max_num_seqs: int, cache_root: bytes = b"",
        spec: ModelSpec | None = None, num_stages: int = 1,
    ) -> None:  # fmt: skip
        """Args: `spec` says where attention lets a step be cut; None: anywhere (plain dense attention).

        The step after a sample is planned before the token is known: its slice has a length of 1 and no ids, and the
        first stage takes the token that the last one of `num_stages` has sampled. Several stages run ahead only while
        nothing but decoding is to be done: a chunk of a prompt would wait for the token too.
        """
        self._num_stages = num_stages
        if spec is not None and spec.sparse is not None:
            grid = spec.sparse.cell, spec.chunk_distance
            if any(size % page_size for size in grid):
                raise ValueError(f"cells of {grid[0]} tokens and chunks of {grid[1]}: must be multiples of {page_size}")
        self.pool = pool
        self.spec = spec
        self._page_size = page_size
        self._budget = max_num_batched_tokens
        self._max_seqs = max_num_seqs
        self._keys = PrefixKeys(cache_root, page_size, spec)
        self._step = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._pending: dict[bytes, int] = {}  # pages some running request is about to compute -> its sequence
        self._released: list[int] = []
        self._no_room_for: tuple[int, int] | None = None  # the request at the head of the queue, and when

    @property
    def decodes(self) -> bool:
        """Whether the next step gives every running request one token, and nothing waits to be admitted."""
        return not self._waiting and all(request.remaining <= 1 for request in self._running)

    def is_sparse(self, part: SequenceSlice) -> bool:
        """Whether the rows of a slice select their keys; all of them do or none."""
        return self.spec is not None and grid.is_sparse(self.spec, part.start, part.prompt_len)

    def chunks_left(self, request: Request) -> list[Chunk]:
        """The steps the rest of a prompt takes when it has the whole budget of each."""
        size = request.num_prompt
        return list(chunks(self.spec, min(request.num_computed, size), size, size, self._budget))

    def pages_needed(self, request: Request) -> int:
        """Pages for the prompt and every token it may generate (the last one is never fed back)."""
        tokens = request.num_prompt + request.stop.max_tokens - 1
        return -(-tokens // self._page_size)

    def prepare(self, request: Request) -> None:
        """Check and hash a request. Reads nothing that changes, so it may run on the submitter's thread.

        Raises:
            DoesNotFit: it needs more pages than the whole pool has.
        """
        needed = self.pages_needed(request)
        if needed > self.pool.num_pages:
            held = self.pool.num_pages * self._page_size
            fits = max(0, held - request.stop.max_tokens + 1)
            raise DoesNotFit(
                f"prompt of {request.num_prompt} tokens with max_tokens {request.stop.max_tokens}: the KV cache holds "
                f"{held} tokens; at most {fits} prompt tokens would fit (or raise kv_cache.bytes)"
            )
        request.length_key = self._keys.length_key(request.num_prompt)
        request.hashes = self._keys.hashes(request.prompt, request.length_key)

    def add(self, request: Request) -> None:
        """Queue a request after `prepare`: behind those of its priority and above."""
        at = len(self._waiting)
        while at and self._waiting[at - 1].priority < request.priority:
            at -= 1
        self._waiting.insert(at, request)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute now."""
        self._admit()
        shares = share_budget(self._budget, self._wanted())
        stands = [Stand(r.num_scheduled, r.num_prompt, n, r.credit) for r, n in zip(self._running, shares, strict=True)]
        lengths, credits = cut(self.spec, stands)
        for request, credit in zip(self._running, credits, strict=True):
            request.credit = credit
        slices = tuple(self._slice(r, n) for r, n in zip(self._running, lengths, strict=True) if n)
        if not slices:
            return None
        released, self._released = tuple(self._released), []
        self._step += 1
        return StepPlan(self._step, slices, released)

    def commit(self, plan: StepPlan, samples: Iterable[SampledToken]) -> list[Request]:
        """Take the result of a plan; returns the requests it touched. Finished ones have given their pages back."""
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
        """Verify the page pool against the requests that run; raises AssertionError."""
        self.pool.check_integrity(request.pages for request in self._running)
        alive = {request.sequence for request in self._running}
        assert set(self._pending.values()) <= alive, "pages are pending for requests that do not run"

    # --- internals ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        held_back: list[Request] = []
        while self._waiting and len(self._running) < self._max_seqs:
            request = self._waiting.popleft()
            full = self._no_room_for == (request.sequence, self.pool.num_releases)  # until a page comes back
            if not full and self._awaits_prefix(request):
                held_back.append(request)
            elif full or not self._reserve(request):
                self._no_room_for = (request.sequence, self.pool.num_releases)
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(held_back))

    def _shareable(self, request: Request) -> Sequence[bytes]:
        """The pages it could adopt: at least one token is computed, to sample from."""
        pages = min((request.num_tokens - 1) // self._page_size, len(request.hashes))
        return request.hashes[: self._keys.whole_pages(pages, request.num_prompt)]

    def _match(self, request: Request) -> tuple[int, ...]:
        """The pages of the longest known prefix it can go on after."""
        found = self.pool.match(self._shareable(request))
        return found[: self._keys.whole_pages(len(found), request.num_prompt)]

    def _choose_length(self, request: Request) -> None:
        """Look for its prefix under nearby lengths too, and take the one that has most of it; its own in doubt.

        A resumed request keeps its own: what it said before was computed with it.
        """
        own = self._keys.length_key(request.num_prompt)
        nearby = [] if request.output else self._keys.nearby(request.num_prompt)
        if not nearby and request.length_key == own:
            return
        limit = len(self._shareable(request))
        least = max(1, int(_FOREIGN_SHARE * request.num_prompt) // self._page_size)
        best, chosen = 0, own
        for key in (own, *nearby):
            same = key == request.length_key
            hashes = request.hashes if same else self._keys.iter_hashes(request.prompt, key)
            known = sum(1 for _ in takewhile(self._is_known, islice(hashes, limit)))
            known = self._keys.whole_pages(known, request.num_prompt)
            if known > best and (key == own or known >= least):
                best, chosen = known, key
        if chosen != request.length_key:
            request.length_key = chosen
            request.hashes = self._keys.hashes(request.prompt, chosen)

    def _is_known(self, key: bytes) -> bool:
        return key in self._pending or self.pool.knows(key)

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether another request is computing pages this one needs: waiting for them saves the work."""
        if request.awaits is not None and request.awaits in self._pending:
            return True
        request.awaits = None
        self._choose_length(request)
        hashes = self._shareable(request)
        known = stop = len(self.pool.match(hashes))
        while stop < len(hashes) and hashes[stop] in self._pending:
            stop += 1
        stop = self._keys.whole_pages(stop, request.num_prompt)
        if stop > known:
            request.awaits = hashes[stop - 1]
        return request.awaits is not None

    def _reserve(self, request: Request) -> bool:
        """Adopt the cached prefix, allocate the rest; False (nothing changed) without room."""
        shared = self._match(request)
        missing = self.pages_needed(request) - len(shared)
        if missing > self.pool.num_available - self.pool.num_unread(shared):
            return False
        self.pool.adopt(shared)
        own = self.pool.allocate(missing)
        assert own is not None, "room was counted"
        request.pages = shared + own
        request.num_cached = request.num_computed = request.num_scheduled = len(shared) * self._page_size
        request.published = len(shared)
        request.scale_len = self._keys.scale_len(request.num_prompt, request.length_key)
        self._keys.note(request.num_prompt, request.length_key)
        request.status = Status.RUNNING
        for key in request.hashes[len(shared) :]:
            if not self.pool.knows(key):
                self._pending.setdefault(key, request.sequence)
        self._running.append(request)
        return True

    def _wanted(self) -> list[int]:
        """Tokens to schedule of every running request.

        Decoding ahead through several stages, the sequences take turns in as many groups as there are stages: while
        one stage computes the next tokens of one group, another stage has another group, and none waits.
        """
        wanted = [self._remaining(request) for request in self._running]
        if self._num_stages == 1:
            return wanted
        known = [request.remaining for request in self._running]
        if max(known, default=0) > 1:
            return known
        unfinished = [request for request, tokens in zip(self._running, wanted, strict=True) if tokens]
        size = max(1, -(-len(unfinished) // self._num_stages))
        groups = -(-len(unfinished) // size)
        ready = [r for r in unfinished if not r.samples_in_flight or self._step + 1 - r.sampled_at >= groups]
        turn = {request.sequence for request in sorted(ready, key=lambda r: r.sampled_at)[:size]}
        return [n if r.sequence in turn else 0 for r, n in zip(self._running, wanted, strict=True)]

    def _remaining(self, request: Request) -> int:
        """Tokens to schedule; while the next one is being sampled, it counts if the stages can go on by themselves."""
        ahead = request.samples_in_flight
        if ahead and len(request.output) + ahead < request.stop.max_tokens:
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
            request.sampled_at = self._step + 1
        used = -(-stop // self._page_size)
        fresh = request.pages[request.pages_sent : used]
        request.pages_sent = used
        request.num_scheduled = stop
        tokens = request.tokens(start, stop)
        return SequenceSlice(
            request.sequence, start, length, request.num_prompt, tokens, fresh, used, sample, request.scale_len
        )

    def _publish(self, request: Request) -> None:
        """Make prompt pages findable that are computed now."""
        full = min(request.num_computed // self._page_size, len(request.hashes))
        for index in range(request.published, full):
            key = request.hashes[index]
            self.pool.publish(request.pages[index], key)
            if self._pending.get(key) == request.sequence:
                del self._pending[key]
        request.published = max(request.published, full)

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self.pool.release(request.pages)
            self._released.append(request.sequence)
            for key in request.hashes[request.published :]:
                if self._pending.get(key) == request.sequence:
                    del self._pending[key]
        request.pages = ()
        request.status = Status.FINISHED
