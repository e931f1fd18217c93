"""Unit tests may not start Ray, open sockets or serve gRPC: all of these raise here.

gloo groups of threads (see `test_collectives`) open loopback sockets below Python; they are the only exception.
"""

import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import ray


def _forbidden(what: str) -> Callable[..., Any]:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError(f"{what} is forbidden in unit tests: move the test to tests/integration")

    return refuse


@pytest.fixture(autouse=True)
def _no_outside_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", _forbidden("ray.init"))
    monkeypatch.setattr(grpc, "server", _forbidden("grpc.server"))
    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, _forbidden(f"socket.{name}"))
