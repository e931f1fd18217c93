"""The control plane: configuration, scheduling, jobs. Pure Python; never imports torch.

The names below load their modules when they are first used, so that `import cluster` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.client.async_client import AsyncClient
    from cluster.client.async_jobs import AsyncJob
    from cluster.client.client import Client
    from cluster.client.connection import ConnectionOptions
    from cluster.client.documents.async_documents import AsyncDocuments
    from cluster.client.documents.documents import Documents
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
    from cluster.client.ingest.source import DocumentText, read_source
    from cluster.client.jobs import Job
    from cluster.client.models import (
        Answer,
        ClusterStatus,
        Document,
        JobData,
        JobEnded,
        Progress,
        ProgressEvent,
        StageStatus,
        Token,
        TokenCount,
        TokenEvent,
    )
    from cluster.client.requests import SubmitOptions
    from cluster.client.retry import RetryPolicy
    from cluster.engine.runtime import LocalCluster
    from protos.jobs.sampling import AnswerOptions, Sampling, SamplingParams

__all__ = [
    "Answer", "AnswerOptions", "AsyncClient", "AsyncDocuments", "AsyncJob", "Busy", "Client", "ClusterStatus",
    "Conflict", "ConnectionOptions", "Document", "DocumentText", "Documents", "InvalidRequest", "Job", "JobData",
    "JobEnded", "JobFailed", "LocalCluster", "LongreachError", "NotFound", "Progress", "ProgressEvent", "RetryPolicy",
    "Sampling", "SamplingParams", "StageStatus", "SubmitOptions", "TlsError", "Token", "TokenCount", "TokenEvent",
    "Unauthenticated", "Unavailable", "read_source",
]  # fmt: skip

# the modules of the names, light ones first
_MODULES = [
    "cluster.client.errors", "cluster.client.models", "cluster.client.retry", "cluster.client.connection",
    "cluster.client.ingest.source", "cluster.client.requests", "cluster.client.client", "cluster.client.jobs",
    "cluster.client.documents.documents", "cluster.client.async_client", "cluster.client.async_jobs",
    "cluster.client.documents.async_documents", "protos.jobs.sampling", "cluster.engine.runtime",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(importlib.import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
