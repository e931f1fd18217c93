"""What is refused before anything starts: ports, data directory, room for KV. KV sizes in bytes: test_memory_budget."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import ClassVar

import pytest

from cluster.common.errors import PreflightError
from cluster.config.deployment import Deployment, load_deployment
from cluster.config.memory_budget import kv_token_bytes
from cluster.stages.preflight import check_head, check_port, check_room, count_pages
from protos.node.node_check import NodeError
from protos.stage.messages import LoadProgress
from tests.support.paths import CONFIGS


def deployment(tmp_path: Path, **overrides: object) -> Deployment:
    given = {"data_dir": str(tmp_path / "data"), "model.max_model_len": 4096, **overrides}
    return load_deployment(CONFIGS / "single.yaml", {key.replace("__", "."): value for key, value in given.items()})


class FakeSocket:
    """Binds every port but 7777."""

    bound: ClassVar[list[tuple[socket.AddressFamily, str, int]]] = []

    def __init__(self, family: socket.AddressFamily) -> None:
        self.family = family

    def __enter__(self) -> FakeSocket:
        return self

    def __exit__(self, *_: object) -> None: ...

    def setsockopt(self, *_: object) -> None: ...

    def bind(self, address: tuple[str, int]) -> None:
        if address[1] == 7777:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        self.bound.append((self.family, *address))


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", FakeSocket)
    check_port("127.0.0.1", 0)
    check_port("127.0.0.1", 7000)
    check_port("::1", 7001)
    assert FakeSocket.bound == [(socket.AF_INET, "127.0.0.1", 7000), (socket.AF_INET6, "::1", 7001)]
    with pytest.raises(PreflightError) as caught:
        check_port("127.0.0.1", 7777)
    assert str(caught.value) == (
        "server.port: 7777: cannot be bound on 127.0.0.1 (Address already in use): choose a free port, or 0 for none"
    )


def test_the_head_is_checked(tmp_path: Path) -> None:
    fingerprint = check_head(deployment(tmp_path))
    assert len(fingerprint) >= 16
    assert (tmp_path / "data").is_dir()
    assert check_head(deployment(tmp_path, model__load_format="dummy")) == ""
    with pytest.raises(PreflightError, match=r"kv_cache: room for \d+ tokens an actor, model.max_model_len is 4096"):
        check_head(deployment(tmp_path, kv_cache__bytes="1MiB"))
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match=r"data_dir: .* cannot be written"):
        check_head(deployment(tmp_path, data_dir=str(tmp_path / "file" / "inside")))


def test_room_for_one_context(tmp_path: Path) -> None:
    given = deployment(tmp_path)
    page = 64 * kv_token_bytes(given)
    assert check_room(given, 64 * page) == 64
    assert check_room(given, 65 * page - 1) == 64
    with pytest.raises(
        PreflightError, match=f"give kv_cache.bytes at least {64 * page >> 20}MiB, or lower max_model_len"
    ):
        check_room(given, 64 * page - 1)


def test_pages_are_what_sequences_can_use_or_memory_affords(tmp_path: Path) -> None:
    def pages(device: str, available: int, shards_per_node: int) -> int:
        given = deployment(tmp_path, cluster__device=device, kv_cache__bytes=None, kv_cache__fraction=0.5)
        loaded = [LoadProgress(0, 0, ready=True, available_bytes=size << 20) for size in (64 * 1024, available)]
        return count_pages(given, loaded, shards_per_node)

    assert pages("cpu", 64 * 1024, 1) == 64 * 16  # 16 sequences of 4,096 tokens
    few = pages("cpu", 300, 1)
    assert 64 <= few < 64 * 16
    assert pages("cpu", 600, 2) == few  # two shards share the memory of a node
    assert 64 <= pages("cuda", 650, 2) == pages("cuda", 650, 1) < 64 * 16  # each has a GPU of its own
