"""Decide every step: which requests run, how many tokens of each, in which pages. Pure Python, no clock, no I/O.

A request reserves all pages it can ever need when it is admitted (prompt and max_tokens), so nothing that runs can run
out of memory. Its pages go back as soon as it ends, even with steps of it in flight: stages execute plans in order, so
whoever gets the pages next writes them later, and pages that others can find are never among what such a step writes.

Stored KV is read into pages beside the steps, while its request is LOADING. Such a read waits for steps in flight that
still use these pages, and keeps the pages until it is over, even when the request ends before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from cluster.scheduler.chunking import Chunk, DynamicChunks, PrefillShare, chunks, fit_to_grid, share_budget
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.prefix_cache import PrefixCache
from cluster.scheduler.prefix_keys import PrefixKeys
from cluster.scheduler.request import FinishReason, Request, Status
from cluster.scheduler.stored_prefix import Load, StoredPrefixes
from protos.errors import UserError
from protos.model import grid
from protos.model.spec import ModelSpec
from protos.stage.messages import KvBlock, SampledToken, SampleSpec, SequenceSlice, StepPlan, TokenBias


class DoesNotFit(UserError):
    """A request that could never run, with the numbers."""


class Scheduler:
    """Owns the requests and their pages. `schedule` and `commit` alternate freely: several plans may be in flight.

    Args:
        cache_root: what the content of KV depends on besides tokens and positions.
        spec: says where attention lets a step be cut; None: anywhere (plain dense attention).
        num_stages: stages of the pipeline. The step after a sample is planned before the token is known: its slice has
            a length of 1 and no ids, and the first stage takes the token that the last one has sampled. Several stages
            run ahead only while nothing but decoding is to be done: a chunk of a prompt would wait for the token too.
        share_across_lengths: let prompts share pages of nearly equal length scale too, see `PrefixCache`.
        block_tokens: tokens of a block of the KV store, a multiple of `page_size`; 0: there is no store.
        kernel_family: of this cluster; see `PrefixKeys`.
        dynamic: limits of dense steps; None: they have none.
    """

    def __init__(
        self, pool: PagePool, page_size: int, max_num_batched_tokens: int, max_num_seqs: int, cache_root: bytes = b"",
        spec: ModelSpec | None = None, num_stages: int = 1, share_across_lengths: bool = False, block_tokens: int = 0,
        kernel_family: str = "", dynamic: DynamicChunks | None = None,
    ) -> None:  # fmt: skip
        if block_tokens % page_size:
            raise ValueError(f"block_tokens: {block_tokens}: must be a multiple of {page_size}")
        if spec is not None and spec.sparse is not None:
            cell, distance = spec.sparse.cell, spec.chunk_distance
            if cell % page_size or distance % page_size:
                raise ValueError(f"cells of {cell} tokens and chunks of {distance}: must be multiples of {page_size}")
        self.pool = pool
        self.spec = spec
        self._page_size = page_size
        self._budget = max_num_batched_tokens
        self._max_seqs = max_num_seqs
        self._num_stages = num_stages
        self._dynamic = dynamic
        keys = PrefixKeys(cache_root, page_size, spec, block_tokens, kernel_family)
        self._prefixes = PrefixCache(pool, page_size, keys, share_across_lengths)
        self.stored = StoredPrefixes(self._prefixes, page_size, block_tokens)
        self._step = 0
        self._committed = 0  # the newest step whose result is here
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by sequence, in order of admission
        self._loading: dict[int, Load] = {}  # by sequence; of requests that may have ended meanwhile
        self._loads: list[Load] = []  # that are not begun
        self._late_steps: list[tuple[int, frozenset[int]]] = []  # in flight, with pages of ended requests that they use
        self._released: list[int] = []  # sequences that the next plan releases
        self._no_room_for: tuple[int, int] | None = None  # the first waiting sequence, and `pool.num_releases` then

    @property
    def is_decoding(self) -> bool:
        """Whether every step gives every running request one token, and nothing waits to be admitted."""
        running = self._running.values()
        return not self._waiting and all(r.remaining <= 1 and r.may_run_ahead for r in running)

    @property
    def depth(self) -> int:
        """The steps to have in flight while not all decode: one a stage, at least two.

        A prompt that is alone in a pipeline has one more, so that no stage waits where one is late, or the head: nobody
        else has to wait for it.
        """
        running = self._running.values()
        is_alone = self._num_stages > 1 and len(running) == 1 and not self._waiting
        return max(2, self._num_stages) + (is_alone and all(request.remaining > 1 for request in running))

    def is_sparse(self, part: SequenceSlice) -> bool:
        """Return whether the rows of a slice select their keys; all of them do or none."""
        return self.spec is not None and grid.is_sparse(self.spec, part.start, part.prompt_len)

    def chunks_left(self, request: Request) -> list[Chunk]:
        """Return the steps the rest of a prompt takes when it has the whole budget of each."""
        size = request.num_prompt
        return list(chunks(self.spec, min(request.num_computed, size), size, size, self._budget, self._dynamic))

    def pages_needed(self, request: Request) -> int:
        """Return the pages for the prompt and every token it may generate (the last one is never fed back)."""
        tokens = request.num_prompt + request.stop.max_tokens - 1
        return -(-tokens // self._page_size)

    def prepare(self, request: Request) -> None:
        """Check and hash a request. Reads nothing that changes, so it may run on the submitter's thread.

        Raises:
            DoesNotFit: it needs more pages than the whole pool has.
        """
        if self.pages_needed(request) > self.pool.num_pages:
            capacity = self.pool.num_pages * self._page_size
            fits = max(0, capacity - request.stop.max_tokens + 1)
            raise DoesNotFit(
                f"prompt of {request.num_prompt} tokens with max_tokens {request.stop.max_tokens}: the KV cache holds "
                f"{capacity} tokens; at most {fits} prompt tokens would fit (or raise kv_cache.bytes)"
            )
        self._prefixes.prepare(request)

    def add(self, request: Request) -> None:
        """Queue a request after `prepare`: behind those of its priority and above."""
        at = len(self._waiting)
        while at and self._waiting[at - 1].priority < request.priority:
            at -= 1
        self._waiting.insert(at, request)

    def admit(self) -> None:
        """Start waiting requests in order while there is room; one that waits for a prefix lets others pass."""
        held_back: list[Request] = []
        while self._waiting and len(self._running) + len(self._loading) < self._max_seqs:
            request = self._waiting.popleft()
            is_full = self._no_room_for == (request.sequence, self.pool.num_releases)  # until a page comes back
            if not is_full and (self._prefixes.must_wait(request) or self.stored.must_wait(request)):
                held_back.append(request)
            elif is_full or not self._start(request):
                self._no_room_for = (request.sequence, self.pool.num_releases)
                self._waiting.appendleft(request)
                break
        self._waiting.extendleft(reversed(held_back))

    def take_loads(self) -> list[Load]:
        """Return the loads that may begin now; each is answered by `loaded`."""
        ready = [load for load in self._loads if load.after_step <= self._committed]
        self._loads = [load for load in self._loads if load.after_step > self._committed]
        return ready

    def loaded(self, load: Load, blocks: int) -> None:
        """Take the end of a load, of which the first `blocks` are there: the request goes on after them.

        Of a request that has ended meanwhile, others find what was read.
        """
        request = load.request
        del self._loading[request.sequence]
        pages = self._prefixes.usable(request, self.stored.pages_before(load.first + blocks))
        request.num_cached = request.num_computed = request.num_scheduled = pages * self._page_size
        self._prefixes.publish(request)
        for block in load.blocks[:blocks]:
            self.pool.mark_stored(block)
        if request.status is Status.FINISHED:
            self._give_back(request)
        else:
            request.status = Status.RUNNING
            self._running[request.sequence] = request

    def schedule(self) -> StepPlan | None:
        """Return the next step, or None when there is nothing to compute now.

        There is no prefill phase and no decoding phase. Each request has tokens present (prompt and output) and tokens
        scheduled; a step schedules some of the difference, so that the tokens computed chase the tokens present. When
        a request has caught up, its next token is sampled. That covers chunked prefill, cached prefixes, decoding and
        resumed requests alike.
        """
        self.admit()
        running = list(self._running.values())
        granted = share_budget(self._budget, self._wanted(running))
        lengths = self._fit_to_grid(running, granted)
        slices = tuple(self._slice(request, length) for request, length in zip(running, lengths, strict=True) if length)
        if not slices:
            return None
        released, self._released = tuple(self._released), []
        self._step += 1
        return StepPlan(self._step, slices, released)

    def commit(self, plan: StepPlan, samples: Iterable[SampledToken]) -> list[Request]:
        """Take the result of a plan; returns the requests it advanced. Finished ones have given their pages back."""
        sampled = {sample.sequence: sample for sample in samples}
        self._committed = plan.step
        self._late_steps = [late for late in self._late_steps if late[0] > plan.step]
        advanced = []
        for part in plan.slices:
            request = self._running.get(part.sequence)
            if request is None:
                continue  # it ended while this step was in flight
            request.num_computed = part.start + part.length
            self._prefixes.publish(request)
            if part.sample is not None:
                request.samples_in_flight -= 1
                request.accept(sampled[part.sequence])
            if request.finish_reason is not None:
                self._finish(request)
            advanced.append(request)
        return advanced

    def stop(self, request: Request, reason: FinishReason) -> None:
        """End a request for a reason of the engine's (stop string, cancel); its steps in flight are wasted."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        request.finish_reason = reason
        self._finish(request)

    def keep_documents(self, living: Collection[str], later: int) -> None:
        """Let nobody find KV of documents that are gone, nor what requests about them still compute.

        Args:
            living: documents that are not gone; nor are those of requests from sequence `later` on.
        """
        loading = (load.request for load in self._loading.values())
        requests = [item for item in (*self._waiting, *self._running.values(), *loading) if item.document_id]
        living = {*living, *(item.document_id for item in requests if item.sequence >= later)}
        self.pool.keep_documents(living)
        for request in requests:
            if request.document_id not in living:
                self._prefixes.hide(request)

    # --- internals ---------------------------------------------------------------------------------------------------

    def _start(self, request: Request) -> bool:
        """Adopt the cached prefix, allocate the rest, and run, or load more of the prefix if the store has it.

        Returns False (nothing changed) without room.
        """
        adopted = self._prefixes.match(request)
        blocks = self.stored.to_load(request, len(adopted))
        if blocks:
            adopted = adopted[: self.stored.pages_before(blocks.start)]
        pages = self.pool.allocate(self.pages_needed(request) - len(adopted), adopted)
        if pages is None:
            return False
        request.pages = pages
        request.num_cached = request.num_computed = request.num_scheduled = len(adopted) * self._page_size
        self._prefixes.begin(request, len(adopted))
        if blocks:
            request.status = Status.LOADING
            contents = self.stored.blocks(request, blocks)
            load = Load(request, contents, blocks.start, self._last_use(contents))
            self._loading[request.sequence] = load
            self._loads.append(load)
        else:
            request.status = Status.RUNNING
            self._running[request.sequence] = request
        return True

    def _last_use(self, blocks: Sequence[KvBlock]) -> int:
        """Return the last step in flight that still reads or writes pages of these blocks, 0 if none does."""
        pages = {page for block in blocks for page in block.pages}
        return max((step for step, used in self._late_steps if used & pages), default=0)

    def _wanted(self, running: list[Request]) -> list[int]:
        """Return the tokens to schedule of every running request.

        Decoding ahead through several stages, the sequences take turns in as many groups as there are stages: while
        one stage computes the next tokens of one group, another stage has another group, and none waits.
        """
        wanted = [self._remaining(request) for request in running]
        if self._num_stages == 1:
            return wanted
        known = [request.remaining for request in running]
        if max(known, default=0) > 1:
            return known
        unfinished = [request for request, tokens in zip(running, wanted, strict=True) if tokens]
        size = max(1, -(-len(unfinished) // self._num_stages))
        groups = -(-len(unfinished) // size)
        ready = [r for r in unfinished if not r.samples_in_flight or self._step + 1 - r.sampled_at >= groups]
        turn = {request.sequence for request in sorted(ready, key=lambda r: r.sampled_at)[:size]}
        return [tokens if r.sequence in turn else 0 for r, tokens in zip(running, wanted, strict=True)]

    def _remaining(self, request: Request) -> int:
        """Return the tokens to schedule; one that is being sampled counts if the stages can go on by themselves."""
        ahead = request.samples_in_flight if request.may_run_ahead else 0
        if ahead and len(request.output) + ahead < request.stop.max_tokens:
            return request.remaining + ahead
        return request.remaining

    def _fit_to_grid(self, running: list[Request], granted: list[int]) -> list[int]:
        """Return the lengths of the slices, and carry the deficits over."""
        shares = [
            PrefillShare(request.num_scheduled, request.num_prompt, tokens, request.deficit)
            for request, tokens in zip(running, granted, strict=True)
        ]
        lengths, deficits = fit_to_grid(self.spec, shares, self._dynamic)
        for request, deficit in zip(running, deficits, strict=True):
            request.deficit = deficit
        return lengths

    def _slice(self, request: Request, length: int) -> SequenceSlice:
        """Return the next `length` tokens as part of a plan, and count them as scheduled."""
        start = request.num_scheduled
        stop = start + length
        sample = None
        if stop >= request.num_tokens:  # beyond: the token in between is in flight
            sample = _sample_spec(request, stop)
            request.samples_in_flight += 1
            request.sampled_at = self._step + 1
        num_pages = -(-stop // self._page_size)
        is_first = start == request.num_cached  # the stages know none of its pages yet
        new_pages = request.pages[0 if is_first else -(-start // self._page_size) : num_pages]
        request.num_scheduled = stop
        tokens = request.tokens(start, stop)
        targets: Sequence[int] = ()
        top = request.prompt_logprobs
        if top is not None and start + 1 < request.num_prompt:
            targets = request.tokens(start + 1, min(stop + 1, request.num_prompt))
        return SequenceSlice(
            request.sequence, start, length, request.num_prompt, tokens, new_pages, num_pages, sample,
            request.scale_len, targets, top or 0,
        )  # fmt: skip

    def _finish(self, request: Request) -> None:
        status, request.status = request.status, Status.FINISHED
        if status is Status.RUNNING:
            del self._running[request.sequence]
            self._released.append(request.sequence)
            self._give_back(request)
        elif status is Status.LOADING:  # its pages are written to until the load ends, if it has begun
            load = self._loading[request.sequence]
            if load in self._loads:
                self._loads.remove(load)
                del self._loading[request.sequence]
                self._give_back(request)

    def _give_back(self, request: Request) -> None:
        """Release the pages of a request that has ended."""
        if request.num_scheduled > request.num_computed:
            self._late_steps.append((self._step, frozenset(request.pages)))
        self.pool.release(request.pages)
        self._prefixes.end(request)
        request.pages = ()


def _sample_spec(request: Request, stop: int) -> SampleSpec:
    """Return how the token behind position `stop - 1` is sampled; the first one brings what the sampler keeps."""
    params, index = request.sampling, len(request.output) + request.samples_in_flight
    history: Sequence[int] = ()
    outputs: Sequence[int] = ()
    bias: Sequence[TokenBias] = ()
    if not request.sampled_at:
        if params.repetition_penalty != 1.0:
            history = sorted(set(request.tokens(0, stop)))
        if params.counts_tokens:
            outputs = tuple(request.output)
        bias = request.logit_bias
    banned = sorted(request.stop.token_ids) if index < request.stop.min_tokens else ()
    return SampleSpec(
        params, index, history, request.mask, outputs, bias, bool(request.logit_bias), banned, request.forced
    )
