"""The process of one shard: a gRPC server around a `StageWorker`. Imports torch only when weights are loaded.

Failure contract: nothing here is durable. A step that fails makes the shard answer every later plan with the same
error; recovery is a new process. When no engine has been connected for `orphan_timeout_s`, the process ends by itself,
so that it keeps no memory after the head process died.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS, TokenInterceptor
from protos.stage.messages import LoadProgress, StageAddress, StageProcessSpec, StepPlan
from workers.stage.compute_thread import ComputeThread

if TYPE_CHECKING:
    from workers.stage.worker import StageWorker

TOKEN_VARIABLE = "LONGREACH_LAUNCH_TOKEN"
_PROGRESS_INTERVAL_S = 0.1  # between messages while weights load
_RPC_THREADS = 8  # Run, Activations, Load or Start, and probes, with room to spare


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


class StageServer:
    """The gRPC server of a shard, for the engine and for the previous stage."""

    def __init__(self, spec: StageProcessSpec, on_orphan: Callable[[], None]) -> None:
        self._spec = spec
        self._servicer = _StageServicer(spec, on_orphan, lambda: threading.Thread(target=self.close).start())
        self._server: grpc.Server | None = None
        self._closing = threading.Lock()
        self._closed = threading.Event()

    def start(self, node: str = "", bind: str = "") -> StageAddress:
        """Listen on the Unix socket, and on a TCP port of the IP address `bind` if it is given.

        Raises:
            RuntimeError: an address cannot be bound.
        """
        Path(self._spec.socket).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = grpc.server(
            futures.ThreadPoolExecutor(_RPC_THREADS, thread_name_prefix="rpc"),
            interceptors=[TokenInterceptor(self._spec.token)],
            options=CHANNEL_OPTIONS,
        )
        rpc.add_StageServicer_to_server(self._servicer, server)
        unix = f"unix:{self._spec.socket}"
        server.add_insecure_port(unix)
        tcp = f"{bind}:{server.add_insecure_port(f'{bind}:0')}" if bind else ""
        server.start()
        self._server = server
        self._servicer.await_engine()
        return StageAddress(unix, tcp, node, os.getpid())

    def wait(self) -> None:
        """Block until `close`."""
        self._closed.wait()

    def close(self) -> None:
        """Stop answering and free the model; may be called twice."""
        with self._closing:
            self._close()
        self._closed.set()

    def _close(self) -> None:
        self._servicer.close()
        if self._server is not None:
            self._server.stop(grace=1.0).wait()
            self._server = None
        socket = Path(self._spec.socket)
        socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last shard of this node to close removes the folder
            for store in socket.parent.glob("*.store"):
                store.unlink(missing_ok=True)
            socket.parent.rmdir()


class _StageServicer(rpc.StageServicer):
    """Answers the calls of one shard, whose state is `created`, `loading`, `loaded`, `running` or `failed`."""

    def __init__(self, spec: StageProcessSpec, on_orphan: Callable[[], None], on_close: Callable[[], None]) -> None:
        self._spec = spec
        self._on_orphan = on_orphan
        self._on_close = on_close
        self._worker: StageWorker | None = None
        self._compute = ComputeThread()
        self._state = "created"
        self._error = ""
        self._closed = False
        self._running = threading.Lock()  # held by the one Run stream
        self._connected = False  # while that stream's call lives
        self._timer = threading.Lock()  # guards the orphan timer
        self._orphan: threading.Timer | None = None

    def close(self) -> None:
        self._closed = True
        self._disarm()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # --- life of the shard -------------------------------------------------------------------------------------------

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[pb.LoadProgress]:
        if self._state != "created":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this shard is {self._state} already")
        self._disarm()
        self._state = "loading"
        context.add_callback(self.await_engine)  # when the call ends, however it ends
        updates: queue.SimpleQueue[LoadProgress] = queue.SimpleQueue()
        self._compute.submit(lambda: self._load(request, updates))
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

            worker = StageWorker(self._spec.token, self._spec.threads, self._spec.step_timeout_s)
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
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this shard is {self._state}, not loaded")
            raise AssertionError("abort raises")
        try:
            worker = self._worker
            self._compute.submit(lambda: worker.start(request)).result()
        except Exception as error:  # noqa: BLE001 - see _load
            self._fail(error)
            context.abort(grpc.StatusCode.INTERNAL, self._error)
        self._state = "running"
        self.await_engine()  # anew: it has this long to connect
        return pb.StartReply()

    # --- steps -------------------------------------------------------------------------------------------------------

    def Run(self, bursts: Iterator[pb.StepPlans], context: grpc.ServicerContext) -> Iterator[pb.StepResults]:
        worker = self._worker
        if self._state not in ("running", "failed") or worker is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this shard is {self._state}, not running")
            raise AssertionError("abort raises")
        if not self._running.acquire(blocking=False):
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "an engine is connected already")
        self._connected = True
        self._disarm()
        context.add_callback(self._engine_left)  # when the call ends, even while a step still waits for activations
        results: queue.SimpleQueue[pb.StepResults | None] = queue.SimpleQueue()

        def compute() -> None:  # not on gRPC's thread, which waits until each result has left
            try:
                for group in worker.run(_plans(bursts)):
                    results.put(codec.results_to_pb(group))
            finally:
                self._running.release()
                results.put(None)

        self._compute.submit(compute)
        yield from iter(results.get, None)

    def Activations(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> pb.ActivationsEnd:
        from workers.transport.frames import FrameError
        from workers.transport.grpc_link import GrpcInbox
        from workers.transport.interface import LinkClosed

        inbox = self._worker.inbox if self._worker is not None else None
        if not isinstance(inbox, GrpcInbox):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this shard is {self._state}, not waiting for frames")
            raise AssertionError("abort raises")
        reason = f"{inbox.source} is gone"
        try:
            inbox.receive(frames)
            reason = f"{inbox.source} ended the stream"
        except FrameError as error:
            reason = str(error)
            context.abort(grpc.StatusCode.DATA_LOSS, reason)
        except LinkClosed as error:
            reason = str(error)
            context.abort(grpc.StatusCode.CANCELLED, reason)
        finally:
            inbox.close(reason)
        return pb.ActivationsEnd()

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeReply:
        worker = self._worker
        reply = pb.ProbeReply(state=self._state, error=self._error)
        if worker is not None:
            reply.layers_done, reply.steps_done = worker.layers_done, worker.steps_done
            reply.resident_bytes = worker.resident_bytes()
        return reply

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:
        self._on_close()
        return pb.CloseReply()

    # --- orphans -----------------------------------------------------------------------------------------------------

    def await_engine(self) -> None:
        """Start the timer anew that ends this process unless an engine connects."""
        with self._timer:
            if self._orphan is not None:
                self._orphan.cancel()
            if not self._closed:
                self._orphan = threading.Timer(self._spec.orphan_timeout_s, self._check_orphan)
                self._orphan.daemon = True
                self._orphan.start()

    def _disarm(self) -> None:
        with self._timer:
            if self._orphan is not None:
                self._orphan.cancel()
                self._orphan = None

    def _check_orphan(self) -> None:
        if not self._connected:  # a timer of Load may end beside a Run that began meanwhile
            self._on_orphan()

    def _engine_left(self) -> None:
        self._connected = False
        self.await_engine()

    def _fail(self, error: Exception) -> None:
        self._state = "failed"
        self._error = " ".join(f"{error}".split()) or type(error).__name__


def _plans(bursts: Iterator[pb.StepPlans]) -> Iterator[list[StepPlan]]:
    """Decode the plans of a call until it ends, however it ends. Raises ValueError for what is no plan."""
    with contextlib.suppress(grpc.RpcError):
        for burst in bursts:
            yield codec.plans_from_pb(burst)


def main() -> None:
    """Run one shard as a plain process, without Ray; it prints its address as soon as it listens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default 1)")
    parser.add_argument(
        "--orphan-timeout", type=float, default=180.0, help="seconds without an engine before it ends (default 180)"
    )
    options = parser.parse_args()
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        parser.error(f"{TOKEN_VARIABLE}: not set: put the token of the launch into this environment variable")
    limit_threads(options.threads)
    spec = StageProcessSpec(token, options.socket, threads=options.threads, orphan_timeout_s=options.orphan_timeout)
    server = StageServer(spec, on_orphan=lambda: os._exit(3))
    print(server.start().unix, flush=True)
    server.wait()


if __name__ == "__main__":
    main()
