"""The control plane: configuration, scheduling, jobs. Pure Python; never imports torch.

The names below load their modules when they are first used, so that `import cluster` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.aio import AsyncClient, AsyncJob
    from cluster.client import Client, Job
    from cluster.client_common import (
        Busy,
        Conflict,
        InvalidRequest,
        JobFailed,
        LongreachError,
        NotFound,
        TlsError,
        Unauthenticated,
        Unavailable,
    )
    from cluster.client_results import JobEnded, ProgressEvent, TokenEvent
    from cluster.local import LocalCluster

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Busy",
    "Client",
    "Conflict",
    "InvalidRequest",
    "Job",
    "JobEnded",
    "JobFailed",
    "LocalCluster",
    "LongreachError",
    "NotFound",
    "ProgressEvent",
    "TlsError",
    "TokenEvent",
    "Unauthenticated",
    "Unavailable",
]

_HOMES = {
    "AsyncClient": "cluster.aio",
    "AsyncJob": "cluster.aio",
    "Client": "cluster.client",
    "Job": "cluster.client",
    "JobEnded": "cluster.client_results",
    "LocalCluster": "cluster.local",
    "ProgressEvent": "cluster.client_results",
    "TokenEvent": "cluster.client_results",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "cluster.client_common")), name)
