"""The process of one shard: a gRPC server around a `StageWorker`. Imports torch only when weights are loaded.

Failure contract: nothing here is durable. A step that fails makes the shard answer every later plan with the same
error. If the reason is a neighbour that is gone, Relink makes it run again, with its weights and pages; else recovery
is a new process. When no engine has been connected for `orphan_timeout_s`, the process ends by itself, so that it keeps
no memory after the head process died.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc

from protos.jobs.convert import read_message
from protos.node.locks import hold_folder
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS, TokenInterceptor, add_tcp_port, epoch_of
from protos.stage.identity import Identity
from protos.stage.messages import LoadProgress, StageAddress, StageProcessSpec, StepPlan
from workers.stage.kv_calls import MAX_CALLS, KvCalls
from workers.stage.plan_queue import RunCancelled

if TYPE_CHECKING:
    from workers.stage.worker import StageWorker

TOKEN_VARIABLE = "LONGREACH_LAUNCH_TOKEN"
_PROGRESS_INTERVAL_S = 0.1  # between messages while weights load
_RPC_THREADS = 8 + MAX_CALLS  # Run, Activations, Load or Start, probes, with room to spare; calls about stored KV


def limit_threads(threads: int) -> None:
    """Set the number of compute threads and how they wait; must run before torch is imported in this process.

    Threads spin for some 50 us before they sleep: a decode step has hundreds of short parallel regions, and waking a
    sleeping thread for each costs half of it. An idle process sleeps.
    """
    assert "torch" not in sys.modules, "thread counts must be set before torch is imported"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.pop("OMP_WAIT_POLICY", None)  # passive would overrule the next
    os.environ["GOMP_SPINCOUNT"] = "20000" if threads > 1 else "0"
    os.environ["KMP_BLOCKTIME"] = "0"


class StageServer(KvCalls):
    """The gRPC server of a shard, which is `created`, `loading`, `loaded`, `running` or `failed`."""

    def __init__(self, spec: StageProcessSpec, identity: Identity | None = None) -> None:
        """Args: `identity` is shown to, and asked of, whoever is on another node; None: plain text."""
        super().__init__(spec.threads)
        self._spec = spec
        self._identity = identity
        self._worker: StageWorker | None = None
        # The only thread of this process that computes with tensors. OpenMP keeps a pool of threads for every thread
        # that ever opened a parallel region. As soon as a process has more of them than cores, libgomp lets all of them
        # sleep between regions instead of spinning, and waking them costs more than a short region does: loading,
        # warming up and computing on three threads made a decode step take 1.6 times as long.
        self._compute = futures.ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._state = "created"
        self._error = ""
        self._running = threading.Lock()  # held by the one Run stream
        self._counting = threading.Lock()  # guards the next two
        self._num_calls = 0  # Load and Run calls that live
        self._orphan_timer = threading.Timer(0.0, os._exit)
        self._server: grpc.Server | None = None
        self._lock = -1  # the descriptor that shares the lock of the socket's folder, until this process ends
        self._is_closing = False
        self._closed = threading.Event()

    def start(self, node: str = "", bind: str = "") -> StageAddress:
        """Listen on the Unix socket, and on a TCP port of the IP address `bind` if it is given.

        Raises:
            RuntimeError: an address cannot be bound. OSError: the folder of the socket cannot be made and locked.
        """
        self._lock = hold_folder(Path(self._spec.socket).parent)
        server = grpc.server(
            futures.ThreadPoolExecutor(_RPC_THREADS, thread_name_prefix="rpc"),
            interceptors=[TokenInterceptor(self._spec.token)],
            options=CHANNEL_OPTIONS,
        )
        rpc.add_StageServicer_to_server(self, server)
        unix = f"unix:{self._spec.socket}"
        server.add_insecure_port(unix)
        tcp = add_tcp_port(server, bind, self._identity) if bind else ""
        server.start()
        self._server = server
        self._count_calls()
        return StageAddress(unix, tcp, node, os.getpid())

    def wait(self) -> None:
        """Block until the shard is closed."""
        self._closed.wait()

    def _close(self) -> None:
        """Stop answering and free the model."""
        self._count_calls()
        self.close_store()
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        assert self._server is not None, "a call came before"
        self._server.stop(grace=1.0).wait()
        socket = Path(self._spec.socket)
        with contextlib.suppress(OSError):  # all of the launch close; killed shards have left theirs
            for left in (*socket.parent.glob("*.store"), *socket.parent.glob("*.sock")):
                left.unlink(missing_ok=True)
            socket.parent.rmdir()
        os.close(self._lock)
        self._closed.set()

    # --- life of the shard -------------------------------------------------------------------------------------------

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[pb.LoadProgress]:
        if self._state != "created":
            self._refuse(context, " already")
        self._state = "loading"
        self._count_calls(1)
        context.add_callback(lambda: self._count_calls(-1))  # when the call ends, however it ends
        updates: queue.SimpleQueue[LoadProgress] = queue.SimpleQueue()
        self._compute.submit(self._load, request, updates)
        last = -_PROGRESS_INTERVAL_S
        is_final = False
        while not is_final:
            update = updates.get()
            is_final, now = update.ready or bool(update.error), time.monotonic()
            if is_final or now - last >= _PROGRESS_INTERVAL_S:
                yield codec.encode(update)
                last = now

    def _load(self, request: pb.LoadRequest, updates: queue.SimpleQueue[LoadProgress]) -> None:
        try:
            from workers.stage.worker import StageWorker  # imports torch, after the thread counts are set

            spec = self._spec
            worker = StageWorker(spec.token, spec.threads, spec.step_timeout_s, self._identity, spec.gpu)
            done = worker.load(request, updates.put)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the answer to the caller
            self._fail(error)
            updates.put(LoadProgress(0, 0, error=self._error))
            return
        self._worker = worker
        self._state = "loaded"
        updates.put(done)

    def Start(self, request: pb.StartRequest, context: grpc.ServicerContext) -> pb.StartReply:
        if self._state != "loaded" or self._worker is None:
            self._refuse(context, ", not loaded")
        try:
            self._compute.submit(self._worker.start, request).result()
            if request.kv_store_path:
                self.open_store(*self._worker.open_kv_store(Path(request.kv_store_path), request.kv_block_tokens))
        except Exception as error:  # noqa: BLE001 - see _load
            self._fail(error)
            context.abort(grpc.StatusCode.INTERNAL, self._error)
        self._state = "running"
        self._count_calls()  # the timer starts anew: an engine has this long to connect
        return pb.StartReply()

    def Relink(self, request: pb.StartRequest, context: grpc.ServicerContext) -> pb.StartReply:
        worker = self._worker
        if self._state != "running" or worker is None:
            self._refuse(context, ", not running")
        if request.epoch <= worker.epoch:
            self._refuse_late(context, worker, request.epoch)
        worker.unlink(request.epoch)
        try:
            self._compute.submit(worker.relink, request).result()
        except Exception as error:  # noqa: BLE001 - see _load
            self._fail(error)
            context.abort(grpc.StatusCode.INTERNAL, self._error)
        self._count_calls()
        return pb.StartReply()

    # --- steps -------------------------------------------------------------------------------------------------------

    def Run(self, bursts: Iterator[pb.StepPlans], context: grpc.ServicerContext) -> Iterator[pb.StepResults]:
        worker = self._worker
        if self._state not in ("running", "failed") or worker is None:
            self._refuse(context, ", not running")
        epoch = epoch_of(context.invocation_metadata())
        if epoch != worker.epoch:
            self._refuse_late(context, worker, epoch)
        if not self._running.acquire(blocking=False):
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "an engine is connected already")
        self._count_calls(1)
        context.add_callback(lambda: self._count_calls(-1))  # even while a step still waits for activations
        results: queue.SimpleQueue[pb.StepResults | None] = queue.SimpleQueue()

        def compute() -> None:  # not on gRPC's thread, which waits until each result has left
            try:
                for group in worker.run(_plans(bursts), epoch):
                    results.put(pb.StepResults(results=map(codec.encode, group), epoch=epoch))
            finally:
                self._running.release()
                results.put(None)

        self._compute.submit(compute)
        yield from iter(results.get, None)

    def Activations(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> pb.ActivationsEnd:
        worker = self._worker
        epoch = epoch_of(context.invocation_metadata())
        if worker is not None and epoch != worker.epoch:
            self._refuse_late(context, worker, epoch)
        inbox = worker.inbox if worker is not None else None
        if inbox is None or inbox.entry is None:
            self._refuse(context, ", not waiting for frames")
        reason, is_damaged = inbox.feed(frame.data for frame in frames)
        context.abort(grpc.StatusCode.DATA_LOSS if is_damaged else grpc.StatusCode.CANCELLED, reason)
        return pb.ActivationsEnd()

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeReply:
        worker = self._worker
        reply = pb.ProbeReply(state=self._state, error=self._error)
        if worker is not None:
            reply.layers_done, reply.steps_done = worker.layers_done, worker.steps_done
            reply.resident_bytes = worker.resident_bytes()
            reply.epoch, reply.late, reply.is_computing = worker.epoch, worker.num_late, worker.is_computing
            reply.error = self._error or worker.error
            if worker.is_broken:
                reply.state = "failed"
        return reply

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:
        if not self._is_closing:
            self._is_closing = True
            threading.Thread(target=self._close).start()
        return pb.CloseReply()

    def _count_calls(self, change: int = 0) -> None:
        """Note that a call of an engine begins or ends; without any, a timer starts that ends this process."""
        with self._counting:
            self._num_calls += change
            self._orphan_timer.cancel()
            if not self._num_calls and not self._is_closing:
                self._orphan_timer = threading.Timer(self._spec.orphan_timeout_s, os._exit, [3])
                self._orphan_timer.daemon = True
                self._orphan_timer.start()

    def _refuse(self, context: grpc.ServicerContext, why: str) -> NoReturn:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this shard is {self._state}{why}")
        raise AssertionError("abort raises")

    def _refuse_late(self, context: grpc.ServicerContext, worker: StageWorker, epoch: int) -> NoReturn:
        worker.note_late()
        self._refuse(context, f" in epoch {worker.epoch}, not in {epoch}")

    def _fail(self, error: Exception) -> None:
        self._state = "failed"
        self._error = " ".join(f"{error}".split()) or type(error).__name__


def _plans(bursts: Iterator[pb.StepPlans]) -> Iterator[list[StepPlan]]:
    """Decode the plans of a call until it ends.

    Raises:
        RunCancelled: the call was cancelled, or its connection broke. ValueError: something that is no plan came.
    """
    try:
        for burst in bursts:
            yield [read_message(StepPlan, plan) for plan in burst.plans]
    except grpc.RpcError as error:
        raise RunCancelled from error


def main() -> None:
    """Run one shard as a plain process, without Ray; it prints its address as soon as it listens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default 1)")
    parser.add_argument(
        "--orphan-timeout", type=float, default=180.0, help="seconds without an engine before it ends (default 180)"
    )
    parser.add_argument(
        "--gpu", type=int, default=0, help="index of its GPU among those that it sees, if it is to use one (default 0)"
    )
    options = parser.parse_args()
    os.umask(0o077)  # whatever this process writes is private
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        parser.error(f"{TOKEN_VARIABLE}: not set: put the token of the launch into this environment variable")
    limit_threads(options.threads)
    spec = StageProcessSpec(
        token, options.socket, threads=options.threads, orphan_timeout_s=options.orphan_timeout, gpu=options.gpu
    )
    server = StageServer(spec)
    print(server.start().unix, flush=True)
    server.wait()


if __name__ == "__main__":
    main()
