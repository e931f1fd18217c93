"""One head over the needle checkpoint for all clients, which may reach nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.access.keys import ApiKeys
from tests.support.data.clients.needle_with_tools import link_needle
from tests.support.rigs.head import HeadProcess, free_port
from tests.support.rigs.http import TEAM_KEY, AnsweringService, serving_http

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read once, at the import: no list of prices is fetched
_HERE = ("127.0.0.1", "::1", "localhost", None)


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield where the head listens."""
    folder: Path = tmp_path_factory.mktemp("clients")
    port = free_port()
    with HeadProcess(folder, server=f"  http_port: {port}", model=link_needle(folder / "needle")):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def service() -> AnsweringService:
    return AnsweringService(reasoning=("hm ", "so"))


@pytest.fixture
def scripted(service: AnsweringService) -> Iterator[str]:
    """Yield where a server answers from a script, for those with TEAM_KEY."""
    with serving_http(service, ApiKeys({TEAM_KEY: "team a"})) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_other_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let nothing of a test look up or connect to another host, be it one whose failure the client forgives."""
    tried: list[object] = []

    def only_here(name: str, host_at: int) -> None:
        real = getattr(socket if name == "getaddrinfo" else socket.socket, name)

        def checked(*arguments: Any, **options: Any) -> Any:
            place = arguments[host_at]
            host = place[0] if isinstance(place, tuple) else place
            if host not in _HERE and not isinstance(place, bytes) and not str(place).startswith("/"):
                tried.append(place)
                raise OSError(f"{place}: no test may reach another host")
            return real(*arguments, **options)

        monkeypatch.setattr(socket if name == "getaddrinfo" else socket.socket, name, checked)

    only_here("getaddrinfo", 0)
    only_here("connect", 1)
    only_here("connect_ex", 1)
    yield
    assert not tried
