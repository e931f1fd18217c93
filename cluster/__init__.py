"""The control plane: configuration, scheduling, jobs. Pure Python; never imports torch.

The names below load their modules when they are first used, so that `import cluster` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.client.async_client import AsyncClient, AsyncJob
    from cluster.client.client import Client, Job
    from cluster.client.errors import (
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
    from cluster.client.models import JobEnded, ProgressEvent, TokenEvent
    from cluster.engine.runtime import LocalCluster

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
    "AsyncClient": "cluster.client.async_client",
    "AsyncJob": "cluster.client.async_client",
    "Client": "cluster.client.client",
    "Job": "cluster.client.client",
    "JobEnded": "cluster.client.models",
    "LocalCluster": "cluster.engine.runtime",
    "ProgressEvent": "cluster.client.models",
    "TokenEvent": "cluster.client.models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "cluster.client.errors")), name)
