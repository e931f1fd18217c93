"""The calls about stored KV, which a shard answers on threads of their own while steps run."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from itertools import chain
from typing import TYPE_CHECKING, NoReturn

import grpc

from protos.jobs.convert import read_message
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from workers.kv.block_pages import BlockPages
    from workers.kv.block_store import BlockStore, Outcome

MAX_CALLS = 8  # at the same time; one more is refused, so that probes always find a thread
_READERS = 4  # threads that load blocks, at most
_NICE = 10  # of the threads that load and store: steps go first
_ENTRIES = 1000  # a message
_PIECE = 1 << 20  # bytes a message


class KvCalls(rpc.StageServicer):
    """The part of a shard's service that is about stored KV; every call is refused until `open_store`."""

    def __init__(self, threads: int) -> None:
        self._store: BlockStore | None = None
        self._pages: BlockPages | None = None
        self._free_calls = threading.BoundedSemaphore(MAX_CALLS)
        self._writer = futures.ThreadPoolExecutor(1, "kv store", _lower_priority)
        self._readers = futures.ThreadPoolExecutor(min(_READERS, threads), "kv load", _lower_priority)
        self._is_closed = False

    def open_store(self, store: BlockStore, pages: BlockPages) -> None:
        """Answer calls from now on."""
        self._store, self._pages = store, pages

    def close_store(self) -> None:
        """Refuse calls; those that run end after their present block."""
        self._is_closed, self._store, self._pages = True, None, None
        for pool in (self._writer, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def FindKv(self, request: pb.KvKeys, context: grpc.ServicerContext) -> pb.KvCount:
        with self._begin(context) as (store, _):
            return pb.KvCount(blocks=store.find(_keys(request, context)))

    def TouchKv(self, request: pb.KvKeys, context: grpc.ServicerContext) -> pb.KvCount:
        with self._begin(context) as (store, _):
            return pb.KvCount(blocks=store.touch(_keys(request, context)))

    def LoadKv(self, request: pb.KvBlocks, context: grpc.ServicerContext) -> pb.KvCount:
        with self._begin(context) as (store, pages):
            blocks = _blocks(request, pages, context)
            store.read_ahead(block.key for block in blocks)
            outcomes = self._each(self._readers, blocks, lambda block: store.load(block, pages), context)
            reply = pb.KvCount()
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    reply.damaged += outcome.damaged
                    reply.problem = reply.problem or outcome.problem
                    reply.bytes += outcome.num_bytes
                    if not outcome.blocks:
                        break
                    reply.blocks += 1
            return reply

    def StoreKv(self, request: pb.KvBlocks, context: grpc.ServicerContext) -> pb.KvStored:
        with self._begin(context) as (store, pages):
            blocks = _blocks(request, pages, context)
            outcomes = self._each(self._writer, blocks, lambda block: store.store(block, pages), context)
            reply = pb.KvStored()
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    reply.problem, reply.is_full = outcome.problem, outcome.is_full
                    reply.bytes += outcome.num_bytes
                    if not outcome.blocks:
                        break
                    reply.blocks += 1
            return reply

    def ListKv(self, request: pb.KvListRequest, context: grpc.ServicerContext) -> Iterator[pb.KvEntries]:
        with self._begin(context) as (store, _):
            try:
                free, node, entries = store.free_bytes(), store.identity(), []
                for entry in store.entries():
                    entries.append(pb.KvEntry(
                        key=entry.key, parent=entry.parent, start=entry.start, bytes=entry.num_bytes, used=entry.used
                    ))  # fmt: skip
                    if len(entries) == _ENTRIES:
                        yield pb.KvEntries(entries=entries, free_bytes=free, node=node)
                        entries = []
                yield pb.KvEntries(entries=entries, free_bytes=free, node=node)
            except OSError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, f"KV store: {error}")

    def DropKv(self, request: pb.KvKeys, context: grpc.ServicerContext) -> pb.KvCount:
        with self._begin(context) as (store, _):
            outcome = store.drop(_keys(request, context))
            return pb.KvCount(blocks=outcome.blocks, problem=outcome.problem)

    def ReadKv(self, request: pb.KvKeys, context: grpc.ServicerContext) -> Iterator[pb.KvFile]:
        with self._begin(context) as (store, _):
            for key in _keys(request, context):
                for path in store.files(key):
                    pieces = store.pieces(path, _PIECE)
                    first = next(pieces, None)
                    if first is None:  # somebody removed it
                        continue
                    message = pb.KvFile(key=key, name=path.name, data=first)
                    for piece in pieces:
                        yield message
                        message = pb.KvFile(data=piece)
                    message.is_last = True
                    yield message

    def WriteKv(self, files: Iterator[pb.KvFile], context: grpc.ServicerContext) -> pb.KvCount:
        from workers.kv.open_file import BadBlock

        with self._begin(context) as (store, _):
            reply, keys = pb.KvCount(), set()
            for first in files:
                pieces = _pieces_of_file(first, files)
                try:
                    reply.bytes += store.receive(first.key, first.name, pieces)
                    keys.add(first.key)
                except (BadBlock, OSError) as error:
                    reply.damaged += isinstance(error, BadBlock)
                    reply.problem = reply.problem or " ".join(str(error).split())
                    for _ in pieces:  # the next file begins after them
                        pass
            reply.blocks = len(keys)
            return reply

    # --- parts of calls ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _begin(self, context: grpc.ServicerContext) -> Iterator[tuple[BlockStore, BlockPages]]:
        """Give the store and the pages to a call; it is refused when there is no store, or too many calls run.

        A call that its client has given up counts until it returns its thread: a disk that hangs takes no more threads.
        """
        store, pages = self._store, self._pages
        if store is None or pages is None:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, "no KV store")
        if not self._free_calls.acquire(blocking=False):
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls about the KV store run; try again")
        try:
            yield store, pages
        finally:
            self._free_calls.release()

    def _each(
        self, pool: futures.ThreadPoolExecutor, blocks: Sequence[KvBlock], act: Callable[[KvBlock], Outcome],
        context: grpc.ServicerContext,
    ) -> Generator[Outcome, None, None]:  # fmt: skip
        """Yield what becomes of blocks, in order up to the first that fails; later ones may be done too."""
        from workers.kv.block_store import Outcome

        stop = threading.Event()

        def one(block: KvBlock) -> Outcome:
            if stop.is_set() or self._is_closed or not context.is_active():
                return Outcome(problem="the call was given up")
            outcome = act(block)
            if not outcome.blocks:
                stop.set()
            return outcome

        try:
            tasks = [pool.submit(one, block) for block in blocks]
        except RuntimeError:  # closed meanwhile
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, "no KV store: this shard is closing")
        try:
            for task in tasks:
                yield task.result()
        except futures.CancelledError:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, "no KV store: this shard is closing")
        finally:
            stop.set()
            futures.wait([task for task in tasks if not task.cancel()])  # nobody writes to pages after the reply


def _pieces_of_file(first: pb.KvFile, following: Iterator[pb.KvFile]) -> Iterator[bytes]:
    """Yield the data of a file up to its last piece."""
    yield first.data
    if not first.is_last:
        for piece in following:
            yield piece.data
            if piece.is_last:
                return


def _keys(request: pb.KvKeys, context: grpc.ServicerContext) -> list[bytes]:
    if any(len(key) != 32 for key in request.keys):
        _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "keys: must have 32 bytes each")
    return list(request.keys)


def _blocks(request: pb.KvBlocks, pages: BlockPages, context: grpc.ServicerContext) -> list[KvBlock]:
    blocks = [read_message(KvBlock, block) for block in request.blocks]
    for block in blocks:
        if len(block.key) != 32 or len(block.parent) not in (0, 32):
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "blocks: keys must have 32 bytes, parents none or 32")
        try:
            pages.rows(block.pages, len(block.token_ids))
        except ValueError as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"blocks: {error}")
    used = list(chain.from_iterable(block.pages for block in blocks))
    if len(set(used)) != len(used):
        _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "blocks: a page comes twice")
    return blocks


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("abort raises")


def _lower_priority() -> None:
    """Let the other threads of the machine go before this one; elsewhere than on Linux a process has one priority."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
