"""All calls to Ray, in one place: connect, place actors, stop.

A local cluster has no dashboard, a small object store, and token authentication, which is Ray's default there.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from cluster.common.errors import PlacementError
from cluster.common.text_format import describe_error, one_line
from protos.node.environment import usable_cores
from protos.node.node_check import NodeError

_log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's minimum is 75 MB; nothing of ours goes through it
_CLOSE_TIMEOUT_S = 5.0  # an actor in the middle of a step is killed after this
# Every setting of a local Ray that is made in its environment, with the reason. Ray documents the first three; all else
# stays as Ray has it.
_LOCAL_ENVIRONMENT = {
    "RAY_memory_monitor_refresh_ms": "0",  # it counts mapped weights and would kill stages; preflight budgets memory
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about this machine is sent to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: Ray's processes listen on loopback only
    "RAY_worker_niceness": "0",  # 15 otherwise: whatever else runs on the machine would go before the stages
}


class RayCluster:
    """A connection to Ray and the actors of one pipeline at a time.

    `release` stops the actors, `close` everything; both may be called twice. A pipeline that takes the place of another
    uses the same connection: a process that serves clients already had better not start Ray's, since a fork beside
    running threads may hang, and `ray.init` holds the interpreter lock while it waits for them.
    """

    def __init__(self, address: str, start_timeout_s: float = 60.0) -> None:
        self._address = address
        self._timeout_s = start_timeout_s
        self._group: Any = None  # reserves the place of the actors
        self._actors: list[Any] = []
        self._serving: list[Any] = []
        self._connected = False
        self._closed = threading.Event()

    @property
    def is_local(self) -> bool:
        return self._address == "local"

    def connect(self) -> None:
        """Start a local Ray or join the existing one, unless that is done. Raises PlacementError."""
        if self._connected:
            return
        if self.is_local:
            os.environ.update(_LOCAL_ENVIRONMENT)
            logging.getLogger("ray").setLevel(logging.ERROR)  # it announces its token in a warning
        elif ":" in self._address:
            _check_reachable(self._address)
        ray = _ray()  # after the environment is set
        if ray.is_initialized():
            raise PlacementError("this process is connected to a Ray cluster already: close that connection first")

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "longreach"}
        if self.is_local:
            options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
            options["num_cpus"] = usable_cores()
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            self._in_lasting_thread(lambda: ray.init(address=self._address, **options))
        except BaseException as error:
            if ray.is_initialized():
                ray.shutdown()
            if not isinstance(error, (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError)):
                raise
            reason = one_line(error, 300)
            raise PlacementError(f"cluster.address: {self._address}: Ray cannot be reached: {reason}") from error
        self._connected = True
        self._closed.clear()
        if on_terminate is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray sets its own, which would skip our orderly stop

    def place(
        self, actor_class: Callable[[], Any], num_stages: int, num_ranks: int, cpus: float, gpus: float
    ) -> list[list[Any]]:
        """Start the actors, all those of a stage on one node; return actor handles by stage and rank.

        Args:
            cpus, gpus: what each actor reserves.

        Raises:
            PlacementError: the cluster has no room; says what is needed and what is free.
        """
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": cpus * num_ranks} | ({"GPU": gpus * num_ranks} if gpus else {})
        if not _could_fit(bundle, num_stages):
            raise PlacementError(_no_room(bundle, num_stages, num_ranks))
        group = placement_group([bundle] * num_stages, strategy="PACK")
        if not group.wait(self._timeout_s):
            remove_placement_group(group)
            raise PlacementError(_no_room(bundle, num_stages, num_ranks))
        self._group = group
        handles = []
        for stage in range(num_stages):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=stage)
            remote = _ray().remote(actor_class)
            actors = remote.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy)
            handles.append([actors.remote() for _ in range(num_ranks)])
            self._actors.extend(handles[-1])
        return handles

    def call(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return the answers of actor calls. Raises PlacementError when one fails or does not come in time."""
        ray = _ray()
        try:
            answers: list[Any] = ray.get(list(calls), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise PlacementError(f"actors did not answer within {timeout_s:g} s") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            known = isinstance(cause, (NodeError, RuntimeError))
            raise PlacementError(one_line(cause) if known else f"an actor failed: {describe_error(cause)}") from error
        except ray.exceptions.RayError as error:
            raise PlacementError(f"an actor died: {one_line(error, 300)}") from error
        return answers

    def serve(self) -> None:
        """Start the serving call of every actor; it returns once the actor has closed."""
        self._serving = [actor.serve.remote() for actor in self._actors]

    @staticmethod
    def node_id() -> str:
        """Return Ray's name for the node this process runs on."""
        return str(_ray().get_runtime_context().get_node_id())

    @staticmethod
    def cores_of_a_pipeline(num_stages: int) -> int:
        """Return the CPUs, at least 1, that stages share when they are spread evenly over the nodes.

        Thread counts that are not configured divide them: cores of the smallest node with CPUs, times nodes in use.
        """
        cores = [int(resources.get("CPU", 0)) for resources in _nodes()]
        usable = [count for count in cores if count > 0]
        return max(1, min(usable, default=1) * min(len(usable), num_stages))

    def release(self) -> None:
        """Wait for actors that are closing, kill the rest, and free their place; without Ray, leave that too."""
        if not self._connected:
            return
        from ray.util.placement_group import remove_placement_group

        ray = _ray()
        try:
            if self._serving:
                ray.wait(self._serving, num_returns=len(self._serving), timeout=_CLOSE_TIMEOUT_S)
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                remove_placement_group(self._group)
        except (ray.exceptions.RayError, RuntimeError, ValueError):
            _log.warning("Ray was gone before the actors could be stopped in order", exc_info=True)
            self._leave()
        finally:
            self._actors, self._serving, self._group = [], [], None

    def close(self) -> None:
        """Release the actors, and leave (or end) Ray."""
        self.release()
        self._leave()

    def _leave(self) -> None:
        if self._connected:
            self._connected = False
            _ray().shutdown()
            self._closed.set()

    def _in_lasting_thread(self, start: Callable[[], object]) -> None:
        """Call `start` on a thread that lives until `close`: the kernel ends Ray's processes with their thread."""
        if threading.current_thread() is threading.main_thread():
            start()
            return
        started: Future[None] = Future()

        def run() -> None:
            try:
                start()
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                started.set_exception(error)
            else:
                started.set_result(None)
                self._closed.wait()

        threading.Thread(target=run, name="ray", daemon=True).start()
        started.result()


def _ray() -> Any:
    """Return the module `ray`; imported late, as it reads the environment then."""
    import ray

    return ray


def _nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is alive."""
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


def _could_fit(bundle: dict[str, float], num_stages: int) -> bool:
    """Return whether the stages would fit into the empty cluster, each on one node."""
    nodes = _nodes()
    for key, needed in bundle.items():
        sizes = [resources.get(key, 0.0) for resources in nodes]
        if needed > max(sizes, default=0.0) + 1e-6 or needed * num_stages > sum(sizes) + 1e-6:
            return False
    return True


def _no_room(bundle: dict[str, float], num_stages: int, num_ranks: int) -> str:
    free, nodes = _ray().available_resources(), _nodes()
    parts = []
    for key, needed in bundle.items():
        if needed:
            total = sum(resources.get(key, 0.0) for resources in nodes)
            parts.append(f"{needed * num_stages:g} {key} needed, {free.get(key, 0.0):g} of {total:g} free")
    return (
        f"cluster: {num_stages * num_ranks} actors in {num_stages} stages (each on one node) do not fit: "
        f"{'; '.join(parts)}: "
        "lower cluster.cpus_per_actor, pipeline_parallel_size or expert_parallel_size, or add nodes"
    )


def _check_reachable(address: str) -> None:
    """Raise PlacementError within seconds where Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        raise PlacementError(f"cluster.address: {address}: Ray cannot be reached: {error.strerror or error}") from error
