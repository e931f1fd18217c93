"""Unit tests may not start Ray, open sockets or serve gRPC: all of these raise here.

gloo groups of threads (see `test_collectives`) open loopback sockets below Python; they are the only exception.
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from huggingface_hub import constants

from cluster.jobs.store import JobStore
from tests.support.rigs.service import Bench


def _forbidden(what: str) -> Callable[..., Any]:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError(f"{what} is forbidden in unit tests: move the test to tests/integration")

    return refuse


@pytest.fixture(autouse=True)
def _no_outside_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", _forbidden("ray.init"))
    monkeypatch.setattr(grpc, "server", _forbidden("grpc.server"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a path that is absent may be the name of a model
    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, _forbidden(f"socket.{name}"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**options: object) -> Bench:
        made.append(Bench(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for one in made:
        one.close()
