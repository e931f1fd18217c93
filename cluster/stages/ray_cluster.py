"""All calls to Ray, in one place: connect, place actors, stop. A local Ray is started by `local_ray`."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.common.errors import ClusterError, PlacementError
from cluster.common.signals import call_native
from cluster.common.text_format import describe_error, one_line
from cluster.stages.joined_ray import check_token_file, weak_points
from cluster.stages.local_ray import LocalRay, driver_settings, environment, read_environment
from protos.node.node_check import NodeError

_log = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0  # an actor in the middle of a step is killed after this
_POLL_S = 1.0  # how soon a wait for actors notices that Ray is lost


class RayCluster:
    """A connection to Ray and the actors of one pipeline at a time.

    `release` stops the actors, `close` everything; both may be called twice. A pipeline that takes the place of another
    uses the same connection, unless Ray is lost: then `connect` starts another one. An existing Ray cluster is joined
    as it is and left running.
    """

    def __init__(self, address: str, start_timeout_s: float = 60.0) -> None:
        self._address = address
        self._timeout_s = start_timeout_s
        self._group: Any = None  # reserves the place of the actors
        self._resources = 0.0, 0.0  # CPUs and GPUs of each actor
        self._actors: list[list[Any]] = []  # by stage and rank
        self._serving: dict[int, list[Any]] = {}  # serving calls by stage
        self._connected = False
        self._local: LocalRay | None = None
        self._watching = threading.Lock()  # guards the next two
        self._lost = ""  # why the local Ray has ended
        self._on_lost: Callable[[str], None] | None = None

    @property
    def is_local(self) -> bool:
        return self._address == "local"

    def watch(self, on_lost: Callable[[str], None] | None) -> None:
        """Have `on_lost` called with the reason when the local Ray ends by itself, at once if it has; None: no more."""
        with self._watching:
            self._on_lost, reason = on_lost, self._lost
        if reason and on_lost is not None:
            on_lost(reason)

    def _note_loss(self, reason: str) -> None:
        _log.error("%s", reason)
        with self._watching:
            self._lost, on_lost = reason, self._on_lost
        if on_lost is not None:
            on_lost(reason)

    def connect(self) -> None:
        """Start a local Ray or join the existing one, unless that is done.

        Raises:
            PlacementError, PreflightError: nothing is left running.
        """
        if self._connected and not self._lost:
            return
        self._leave()
        try:
            self._connect()
        except BaseException as error:
            self._leave()
            if isinstance(error, ClusterError) or not isinstance(error, _known_errors()):
                raise
            reason = one_line(error, 300)
            raise PlacementError(f"cluster.address: {self._address}: Ray cannot be reached: {reason}") from error

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "longreach"}
        settings = {"RAY_gcs_rpc_server_reconnect_timeout_s": "86400"}  # else a GCS lost for 60 s ends this process
        if self.is_local:
            logging.getLogger("ray").setLevel(logging.ERROR)  # it announces its token in a warning
            self._local = LocalRay(self._note_loss)
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._local.token}
        else:
            check_token_file(os.environ, Path.home())
            if ":" in self._address:
                _check_reachable(self._address)
        ray = _ray()  # loads while the daemons start
        if ray.is_initialized():
            raise PlacementError("this process is connected to a Ray cluster already: close that connection first")
        address = self._address
        if self._local is not None:
            address = self._local.address(self._timeout_s)
            options["_temp_dir"] = str(self._local.folder)
        self._connected = True  # from here on there may be something to leave
        with driver_settings(settings, self.is_local):
            contexts: list[Any] = []
            call_native(lambda: contexts.append(ray.init(address=address, **options)))
        if self._local is not None:
            self._local.close_folders()
        else:
            for line in weak_points(os.environ, Path(contexts[0].address_info["session_dir"])):
                _log.warning("%s", line)

    @property
    def lost(self) -> str:
        """Why the local Ray has ended; "" while it runs."""
        return self._lost

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

        bundle = {"CPU": cpus * num_ranks} | ({"GPU": gpus * num_ranks} if gpus else {})
        if not _could_fit(bundle, num_stages):
            raise PlacementError(_no_room(bundle, num_stages, num_ranks))
        group = placement_group([bundle] * num_stages, strategy="PACK")
        if not group.wait(self._timeout_s):
            remove_placement_group(group)
            raise PlacementError(_no_room(bundle, num_stages, num_ranks))
        self._group = group
        self._resources = cpus, gpus
        self._actors = [self._spawn(actor_class, stage, num_ranks) for stage in range(num_stages)]
        return [list(stage) for stage in self._actors]

    def replace(self, actor_class: Callable[[], Any], stage: int) -> list[Any]:
        """Kill the actors of a stage, however they are, and start others in their place; return these by rank.

        Where the node is gone, Ray finds another one; the actors answer once it has.

        Raises:
            PlacementError: Ray is gone.
        """
        ray = _ray()
        if self._lost or self._group is None:
            raise PlacementError(self._lost or "no actors are placed")
        try:
            for actor in self._actors[stage]:
                ray.kill(actor)  # a process that is stopped is gone after 5 s
            self._serving.pop(stage, None)
            self._actors[stage] = self._spawn(actor_class, stage, len(self._actors[stage]))
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            raise PlacementError(f"the actors of stage {stage} cannot be replaced: {one_line(error, 300)}") from error
        return list(self._actors[stage])

    def _spawn(self, actor_class: Callable[[], Any], stage: int, num_ranks: int) -> list[Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=stage)
        cpus, gpus = self._resources
        actors = _ray().remote(actor_class).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy)
        return [actors.remote() for _ in range(num_ranks)]

    def call(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return the answers of actor calls. Raises PlacementError when one fails or does not come in time."""
        ray = _ray()
        end = time.monotonic() + timeout_s
        answers: list[Any] | None = None
        try:
            while answers is None:
                left = end - time.monotonic()
                try:
                    answers = ray.get(list(calls), timeout=max(0.0, min(left, _POLL_S)))
                except ray.exceptions.GetTimeoutError as error:
                    if self._lost:
                        raise PlacementError(self._lost) from error
                    if left <= _POLL_S:
                        raise PlacementError(f"actors did not answer within {timeout_s:g} s") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            known = isinstance(cause, (NodeError, RuntimeError))
            raise PlacementError(one_line(cause) if known else f"an actor failed: {describe_error(cause)}") from error
        except ray.exceptions.RayError as error:
            raise PlacementError(f"an actor died: {one_line(error, 300)}") from error
        return answers

    def serve(self, stages: Iterable[int] | None = None) -> None:
        """Start the serving call of the actors of stages (default: all); it returns once the actor has closed."""
        for stage in range(len(self._actors)) if stages is None else stages:
            self._serving[stage] = [actor.serve.remote() for actor in self._actors[stage]]

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
        self.watch(None)
        if not self._connected:
            return
        if self._lost:
            self._leave()
            return
        ray = _ray()
        try:
            self._stop_actors(ray)
        except (ray.exceptions.RayError, RuntimeError, ValueError):
            _log.warning("Ray was gone before the actors could be stopped in order", exc_info=True)
            self._leave()
        finally:
            self._actors, self._serving, self._group = [], {}, None

    def _stop_actors(self, ray: Any) -> None:
        from ray.util.placement_group import remove_placement_group

        if serving := list(itertools.chain.from_iterable(self._serving.values())):
            ray.wait(serving, num_returns=len(serving), timeout=_CLOSE_TIMEOUT_S)
        for actor in itertools.chain.from_iterable(self._actors):
            ray.kill(actor)
        if self._group is not None and not self._lost:  # it would wait a minute
            remove_placement_group(self._group)

    def close(self) -> None:
        """Release the actors, and leave (or end) Ray."""
        self.release()
        self._leave()

    def _leave(self) -> None:
        self._actors, self._serving, self._group = [], {}, None
        if self._connected:
            self._connected = False
            call_native(_ray().shutdown)
            read_environment()  # what the next connection of this process finds is the user's again
        if self._local is not None:
            self._local.close()
            self._local = None
        self._lost = ""


def _ray() -> Any:
    """Return the module `ray`, imported late.

    Where it does not know which process the raylet is, it takes a process whose parent is init, as of every head that
    `up` started, for one that its raylet has left, and ends it when the connection breaks. It reads the id when it is
    imported; this process is alive as long as it asks.
    """
    if "ray" not in sys.modules:
        with environment({"RAY_RAYLET_PID": str(os.getpid())}):
            import ray  # noqa: F401
    return sys.modules["ray"]


def _known_errors() -> tuple[type[Exception], ...]:
    """Return what Ray raises when it cannot be started or joined."""
    return (ConnectionError, RuntimeError, ValueError, OSError, _ray().exceptions.RayError)


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
