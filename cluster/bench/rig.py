"""A head in this process, for measuring: session, store, service and door over a bare checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.client.client import Client, Job
from cluster.client.models import TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import Session
from cluster.jobs.documents import Documents
from cluster.jobs.service import JobService, ServiceLimits
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import Gateway
from cluster.server.head import SWITCH_INTERVAL_S
from cluster.tools.assets import needle_dir


@contextmanager
def head(
    model: Path, folder: Path, model_settings: dict[str, object] | None = None, **settings: dict[str, object]
) -> Iterator[tuple[Client, Session]]:
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
    path.write_text(json.dumps(config))  # which is YAML too
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    deployment = load_deployment(path)
    with ExitStack() as steps:
        session = steps.enter_context(Session(deployment))
        data = deployment.config.data_dir
        store = JobStore(data / "jobs.sqlite")
        steps.callback(store.close)
        documents = Documents(data / "documents", store, 86400.0)
        service = JobService(session, store, documents, ServiceLimits())
        gateway = Gateway(service, deployment.config.server, deployment.config.security, port_override=0)
        steps.callback(gateway.close)
        steps.callback(service.close)
        service.start()
        yield steps.enter_context(Client(gateway.start())), session


def random_ids(length: int, seed: int) -> list[int]:
    """Uniform ids in 5..31999, as every peer gets them."""
    rng = random.Random(seed)
    return [rng.randint(5, 31999) for _ in range(length)]


def token_times(job: Job, began: float) -> list[float]:
    """Seconds from `began` to every token of a job, as the client sees them."""
    return [time.perf_counter() - began for event in job.stream() if isinstance(event, TokenEvent)]
