"""The engine's handle of a shard in another process, over gRPC."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.common.errors import StageError
from cluster.common.text_format import describe_error
from protos.jobs.convert import read_message
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import call_metadata, explain_loss, open_channel, token_metadata
from protos.stage.identity import Identity, shard_name
from protos.stage.messages import KvBlock, LoadProgress, ShardSpec, StepPlan, StepResult

_CLOSE_TIMEOUT_S = 2.0
_KV_TIMEOUT_S = 600.0  # a slow disk and a million tokens


class GrpcStageHandle:
    """One shard. Results and losses arrive on another thread than the caller's."""

    def __init__(self, shard: ShardSpec, address: str, token: str, identity: Identity | None = None) -> None:
        """Args: `identity` is that of this process, for an address on another node; None: plain text."""
        self.shard = shard
        self.name = f"stage {shard.stage} shard {shard.rank}"
        self.epoch = 0  # of the launch: what belongs to another one is refused, here and there
        self._address, self._is_secure = address, identity is not None
        self._channel = open_channel(address, identity, shard_name(shard.stage, shard.rank))
        self._stub = rpc.StageStub(self._channel)  # type: ignore[no-untyped-call, unused-ignore]
        self._token = token
        self._metadata = token_metadata(token)
        self._run: _Run | None = None

    def load(self, request: pb.LoadRequest, timeout_s: float) -> Iterator[LoadProgress]:
        """Load weights; yields progress and ends with a message that is `ready`.

        Raises:
            StageError: the shard refused, failed or vanished.
        """
        try:
            for message in self._stub.Load(request, metadata=self._metadata, timeout=timeout_s):
                progress = read_message(LoadProgress, message)
                if progress.error:
                    raise StageError(f"{self.name}: {progress.error}")
                yield progress
                if progress.ready:
                    return
        except grpc.RpcError as error:
            raise StageError(f"{self.name} while loading: {self._details(error)}") from error
        raise StageError(f"{self.name} stopped loading without a word")

    def start(self, request: pb.StartRequest, timeout_s: float) -> None:
        """Allocate KV and listen for the previous stage.

        Raises:
            StageError: the shard refused, failed or vanished.
        """
        try:
            self._stub.Start(request, metadata=self._metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise StageError(f"{self.name} while starting: {self._details(error)}") from error
        self.epoch = request.epoch

    def relink(self, request: pb.StartRequest, timeout_s: float) -> None:
        """Begin another epoch with other neighbours: sequences are forgotten, weights and KV stay.

        Raises:
            StageError: the shard refused, failed or vanished.
        """
        try:
            self._stub.Relink(request, metadata=self._metadata, timeout=timeout_s)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the handle is closed
            raise StageError(f"{self.name} while connecting again: {self._details(error)}") from error
        self.epoch = request.epoch

    def probe(self, timeout_s: float = 5.0) -> pb.ProbeReply:
        """Return state, counters and memory of the process.

        Raises:
            StageError: it does not answer.
        """
        try:
            reply: pb.ProbeReply = self._stub.Probe(pb.ProbeRequest(), metadata=self._metadata, timeout=timeout_s)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the handle is closed
            raise StageError(f"{self.name}: {self._details(error)}") from error
        return reply

    def find_kv(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first blocks this shard could load from the store. Raises StageError."""
        return int(self._kv_call(lambda: self._stub.FindKv(pb.KvKeys(keys=keys), **self._kv_options())).blocks)

    def touch_kv(self, keys: Sequence[bytes]) -> pb.KvCount:
        """Note in the store of the shard's node that blocks are used; returns how many are there. Raises StageError."""
        reply: pb.KvCount = self._kv_call(lambda: self._stub.TouchKv(pb.KvKeys(keys=keys), **self._kv_options()))
        return reply

    def load_kv(self, blocks: Sequence[KvBlock]) -> pb.KvCount:
        """Read stored blocks into their pages; returns how many, from the first on, are there. Raises StageError."""
        request = pb.KvBlocks(blocks=map(codec.encode, blocks))
        reply: pb.KvCount = self._kv_call(lambda: self._stub.LoadKv(request, **self._kv_options()))
        return reply

    def store_kv(self, blocks: Sequence[KvBlock]) -> pb.KvStored:
        """Write blocks from their pages, which nobody may change meanwhile. Raises StageError."""
        request = pb.KvBlocks(blocks=map(codec.encode, blocks))
        reply: pb.KvStored = self._kv_call(lambda: self._stub.StoreKv(request, **self._kv_options()))
        return reply

    def list_kv(self) -> list[pb.KvEntries]:
        """Return everything in the store of the shard's node, in pieces. Raises StageError."""
        replies: list[pb.KvEntries] = self._kv_call(
            lambda: list(self._stub.ListKv(pb.KvListRequest(), **self._kv_options()))
        )
        return replies

    def drop_kv(self, keys: Sequence[bytes]) -> pb.KvCount:
        """Remove stored blocks; returns how many were there. Raises StageError."""
        reply: pb.KvCount = self._kv_call(lambda: self._stub.DropKv(pb.KvKeys(keys=keys), **self._kv_options()))
        return reply

    def read_kv(self, keys: Sequence[bytes]) -> Iterator[pb.KvFile]:
        """Yield the files of stored blocks of the shard's node in pieces. Raises StageError."""
        try:
            yield from self._stub.ReadKv(pb.KvKeys(keys=keys), **self._kv_options())
        except (grpc.RpcError, ValueError) as error:
            raise StageError(f"{self.name}: {self._details(error)}") from error

    def write_kv(self, files: Iterator[pb.KvFile]) -> pb.KvCount:
        """Put files as `read_kv` gave them into the store of the shard's node. Raises StageError."""
        reply: pb.KvCount = self._kv_call(lambda: self._stub.WriteKv(files, **self._kv_options()))
        return reply

    def _kv_options(self) -> dict[str, Any]:
        return {"metadata": self._metadata, "timeout": _KV_TIMEOUT_S}

    def _kv_call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (grpc.RpcError, ValueError) as error:  # ValueError: the handle is closed
            raise StageError(f"{self.name}: {self._details(error)}") from error

    def connect(self, on_results: Callable[[Sequence[StepResult]], None], on_lost: Callable[[str], None]) -> None:
        """Begin a run, after which plans may be sent.

        Args:
            on_results: called with results in the order of their plans, several at once while the shard decodes.
            on_lost: called at most once, with the reason, when the shard can no longer answer.
        """
        self.disconnect()
        run = self._run = _Run()
        metadata = call_metadata(self._token, self.epoch)
        results = run.call = self._stub.Run(iter(run.plans.get, None), metadata=metadata)

        def read() -> None:
            try:
                for message in results:
                    if message.epoch == self.epoch and not run.is_over:
                        on_results([read_message(StepResult, result) for result in message.results])
            except BaseException as error:  # noqa: BLE001 - whatever it is, the engine must learn that no results come
                if not run.is_over:
                    on_lost(f"{self.name} is gone: {self._details(error)}")
                return
            if not run.is_over:
                on_lost(f"{self.name} ended the run")

        run.thread = threading.Thread(target=read, name=f"results {self.name}", daemon=True)
        run.thread.start()

    def send(self, plans: Sequence[StepPlan]) -> None:
        """Queue plans; never waits for the steps."""
        if self._run is not None:
            self._run.plans.put(codec.plans_to_pb(plans, self.shard.is_first, self.shard.is_last))

    def disconnect(self) -> None:
        """End the run, if there is one; a long step is not waited for."""
        if (run := self._run) is None:
            return
        self._run, run.is_over = None, True
        run.plans.put(None)
        if run.call is not None:
            run.call.cancel()
        if run.thread is not None and run.thread is not threading.current_thread():
            run.thread.join(timeout=5.0)

    def close(self) -> None:
        """End the run and the shard; may be called twice."""
        self.disconnect()
        with contextlib.suppress(grpc.RpcError, ValueError):  # it is gone, or was closed before
            self._stub.Close(pb.CloseRequest(), metadata=self._metadata, timeout=_CLOSE_TIMEOUT_S)
        self._channel.close()

    def abandon(self) -> None:
        """Leave a shard that is gone or hangs, and ask nothing of it; may be called twice."""
        self.disconnect()
        self._channel.close()

    def _details(self, error: BaseException) -> str:
        if isinstance(error, grpc.Call):
            details = explain_loss(error.details() or "", self._address, self._is_secure)
            return f"{details} ({error.code().name})"
        return describe_error(error)


@dataclass(slots=True)
class _Run:
    """One connection of an engine."""

    plans: queue.SimpleQueue[pb.StepPlans | None] = field(default_factory=queue.SimpleQueue)
    call: grpc.Call | None = None
    thread: threading.Thread | None = None
    is_over: bool = False
