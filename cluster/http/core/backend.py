"""What the routes work on: the job service behind them, its limits, and the threads in which they call it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from cluster.access.audit import AuditLog
from cluster.access.call_pool import CallPool
from cluster.config.schema import ServerSection

if TYPE_CHECKING:
    from cluster.engine.runtime import ClusterRuntime
    from cluster.jobs.service import JobService

SHORT_CALLS = 96  # that answer at once and are open at a time
_RUNNING = 32  # calls of the service that run at a time; the others wait for their turn
_MAX_FOLLOWED = 4096  # jobs that wait
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Backend:
    """One job service, as the servers see it; routes use `HttpCall.service`, which has what the caller may see.

    Attributes:
        service: knows no callers.
        streams: places of calls that may last for hours, shared with the other servers of the head.
        short: places of all other calls.
        metrics: returns all metrics in the text format of Prometheus.
    """

    service: JobService
    runtime: ClusterRuntime
    limits: ServerSection
    streams: CallPool
    metrics: Callable[[], bytes] = lambda: b""
    audit: AuditLog = field(default_factory=AuditLog)
    short: CallPool = field(default_factory=lambda: CallPool(SHORT_CALLS, "of short calls", can_preempt=False))

    def __post_init__(self) -> None:
        calls = ThreadPoolExecutor(_RUNNING, thread_name_prefix="http")
        jobs = min(self.limits.max_queued_jobs, _MAX_FOLLOWED)  # one request may have several
        followers = ThreadPoolExecutor(2 * self.limits.max_streams + jobs + 8, thread_name_prefix="http-stream")
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "followers", followers)

    calls: ThreadPoolExecutor = field(init=False)
    followers: ThreadPoolExecutor = field(init=False)  # one thread waits for news of each job that is followed
    batches_changed: threading.Event = field(default_factory=threading.Event, init=False)  # wakes who works on them

    async def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a blocking function returns, called in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.calls, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Let the threads end as soon as they have nothing to do; may be called twice."""
        for executor in (self.calls, self.followers):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def model(self) -> str:
        """The name that clients call the model by."""
        return self.runtime.deployment.config.model.served_model_name
