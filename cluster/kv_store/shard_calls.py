"""Calls about stored KV to all shards of a pipeline at once: a block counts only when every shard has it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cluster.common.errors import StageError
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle
    from protos.stage import stage_pb2 as pb

_CALLS_A_SHARD = 5  # at the same time: two look-ups, two loads, a write
# codes with which a shard says itself that a call is over; after others it may still be at work
_OVER = frozenset({"UNKNOWN", "UNIMPLEMENTED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"})
Reply = TypeVar("Reply")


class ShardLost(Exception):
    """A shard that gave no answer and may still read or write pages; `is_late`: it may live, and took too long."""

    def __init__(self, message: str, is_late: bool) -> None:
        super().__init__(message)
        self.is_late = is_late


@dataclass(frozen=True, slots=True)
class Loaded:
    """What all shards together have read."""

    blocks: int  # from the first on
    bytes: int
    damaged: int
    problem: str


@dataclass(frozen=True, slots=True)
class Stored:
    """What all shards together have written."""

    blocks: int  # from the first on that every shard has
    bytes: tuple[int, ...]  # newly written, by shard
    problem: str
    is_full: bool


class ShardCalls:
    """The shards of one pipeline, or some of them."""

    def __init__(self, shards: Sequence[GrpcStageHandle]) -> None:
        self.shards = tuple(shards)
        self._threads = ThreadPoolExecutor(_CALLS_A_SHARD * len(self.shards), "kv shard")
        self._idle = threading.Condition()
        self._open = 0  # calls under way
        self._unsure: set[int] = set()  # stages whose shards, if they live, may be at work on a call that ended for us

    def find(self, keys: Sequence[bytes], within_s: float) -> int:
        """Return how many of the first blocks every shard could load; one with an error has none.

        Raises:
            TimeoutError: a shard has not answered within the time.
        """
        replies = self._all(lambda shard: shard.find_kv(keys), within_s=within_s)
        return min(reply if isinstance(reply, int) else 0 for reply in replies)

    def touch(self, indices: Sequence[int], keys: Sequence[bytes]) -> None:
        """Note in the stores of these shards' nodes that blocks are used; one that does not answer is left out."""
        self._all(lambda shard: shard.touch_kv(keys), [self.shards[index] for index in indices])

    def load(self, blocks: Sequence[KvBlock]) -> Loaded:
        """Read blocks into their pages, on every shard. Raises ShardLost."""
        replies = self._all(lambda shard: shard.load_kv(blocks))
        self._check(replies)
        counts = [reply for reply in replies if not isinstance(reply, StageError)]
        return Loaded(
            blocks=min(reply.blocks for reply in counts) if len(counts) == len(replies) else 0,
            bytes=sum(reply.bytes for reply in counts),
            damaged=sum(reply.damaged for reply in counts),
            problem=_problem(replies),
        )

    def store(self, blocks: Sequence[KvBlock]) -> Stored:
        """Write blocks from their pages, on every shard. Raises ShardLost."""
        replies = self._all(lambda shard: shard.store_kv(blocks))
        self._check(replies)
        counts = [reply for reply in replies if not isinstance(reply, StageError)]
        return Stored(
            blocks=min(reply.blocks for reply in counts) if len(counts) == len(replies) else 0,
            bytes=tuple(0 if isinstance(reply, StageError) else reply.bytes for reply in replies),
            problem=_problem(replies),
            is_full=any(reply.is_full for reply in counts),
        )

    def entries(self, indices: Sequence[int] | None = None) -> dict[int, list[pb.KvEntries]]:
        """Return what the stores of the nodes of these shards have, by the index of each that answers; None: all."""
        asked = range(len(self.shards)) if indices is None else indices
        replies = self._all(lambda shard: shard.list_kv(), [self.shards[index] for index in asked])
        return {index: reply for index, reply in zip(asked, replies, strict=True) if not isinstance(reply, StageError)}

    def drop(self, indices: Sequence[int], keys: Sequence[bytes]) -> str:
        """Remove blocks from the stores of these shards' nodes; returns the first thing that went wrong, or ""."""
        return _problem(self._all(lambda shard: shard.drop_kv(keys), [self.shards[index] for index in indices]))

    def close(self, within_s: float, replaced: Collection[int] = ()) -> bool:
        """Make no more calls; returns whether no shard is at work on pages any more, within this time.

        Args:
            replaced: stages whose processes are not used any more.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._idle:
            return self._idle.wait_for(lambda: not self._open, within_s) and self._unsure <= set(replaced)

    def _all(
        self, call: Callable[[GrpcStageHandle], Reply], shards: Sequence[GrpcStageHandle] | None = None,
        within_s: float | None = None,
    ) -> list[Reply | StageError]:  # fmt: skip
        def guarded(shard: GrpcStageHandle) -> Reply | StageError:
            try:
                return call(shard)
            except StageError as error:
                return error

        def begin(shard: GrpcStageHandle) -> Future[Reply | StageError]:
            self._count(1)
            try:
                future = self._threads.submit(guarded, shard)
            except RuntimeError:
                self._count(-1)
                raise
            future.add_done_callback(lambda _: self._count(-1))
            return future

        chosen = self.shards if shards is None else shards
        try:
            futures = [begin(shard) for shard in chosen]
        except RuntimeError:  # closed
            return [StageError(f"{shard.name}: the pipeline is being closed") for shard in chosen]
        end = None if within_s is None else time.monotonic() + within_s
        for future in futures:  # `wait` of the library waits for those that `close` has cancelled, for ever
            try:
                with contextlib.suppress(CancelledError):
                    future.exception(None if end is None else max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                raise TimeoutError(f"a shard has not answered within {within_s} s") from error
        return [StageError("cancelled") if future.cancelled() else future.result() for future in futures]

    def _count(self, change: int) -> None:
        with self._idle:
            self._open += change
            self._idle.notify_all()

    def _check(self, replies: Sequence[object]) -> None:
        """Raise ShardLost if a shard may still be at work on a call to all of them."""
        lost: list[ShardLost] = []
        for shard, reply in zip(self.shards, replies, strict=True):
            if isinstance(reply, StageError):
                code = getattr(getattr(reply.__cause__, "code", lambda: None)(), "name", "")
                if code not in _OVER:
                    lost.append(ShardLost(str(reply), is_late=code == "DEADLINE_EXCEEDED"))
                    if reply.__cause__ is not None:  # else the call was not made
                        self._unsure.add(shard.shard.stage)
        if lost:
            raise next((one for one in lost if one.is_late), lost[0])


def _problem(replies: Sequence[pb.KvCount | pb.KvStored | StageError]) -> str:
    """Return the first thing that a shard says is wrong, "" when all is well."""
    texts = (str(reply) if isinstance(reply, StageError) else reply.problem for reply in replies)
    return next(filter(None, texts), "")
