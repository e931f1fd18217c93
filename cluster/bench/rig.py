"""A head in this process, for measuring: runtime, store, service and door over a bare checkpoint."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from cluster.client.client import Client, Job
from cluster.client.models import TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import ServiceLimits
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.head import SWITCH_INTERVAL_S
from cluster.tools.assets import needle_dir


@contextmanager
def head(
    model: Path, folder: Path, model_settings: dict[str, object] | None = None, **settings: dict[str, object]
) -> Iterator[tuple[Client, ClusterRuntime]]:
    """Start a head for token-id prompts; yields a client of it. `settings` are sections of the YAML."""
    linked = folder / "model"
    linked.mkdir()
    for path in model.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (linked / path.name).symlink_to(path.resolve())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (linked / name).exists():
            shutil.copy(needle_dir() / name, linked / name)  # prompts are ids; only the file must be there
    config = {"model": {"path": str(linked), **(model_settings or {})}, "data_dir": str(folder / "data"), **settings}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    deployment = load_deployment(path)
    with ExitStack() as steps:
        runtime = steps.enter_context(ClusterRuntime(deployment))
        data = deployment.config.data_dir
        store = JobStore(data / "jobs.sqlite")
        steps.callback(store.close)
        documents = DocumentStore(data / "documents", store, 86400.0)
        service = JobService(runtime, store, documents, ServiceLimits())
        gateway = GrpcServer(service, deployment.config.server, deployment.config.security, port_override=0)
        steps.callback(gateway.close)
        steps.callback(service.close)
        service.start()
        yield steps.enter_context(Client(gateway.start())), runtime


def random_ids(length: int, seed: int) -> list[int]:
    """Uniform ids in 5..31999, as every peer gets them."""
    rng = random.Random(seed)
    return [rng.randint(5, 31999) for _ in range(length)]


def token_times(job: Job, began: float) -> list[float]:
    """Seconds from `began` to every token of a job, as the client sees them."""
    return [time.perf_counter() - began for event in job.stream() if isinstance(event, TokenEvent)]
