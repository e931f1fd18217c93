"""How what HTTP adds is told from what was measured in turns."""

from __future__ import annotations

from cluster.bench.http.overhead import _summary


def rows(request: float, token: float) -> dict[str, list[float]]:
    return {
        "request_ms": [request, request + 2, request + 9], "request_cpu_ms": [1.0, 2.0, 3.0],
        "token_ms": [token] * 3, "token_cpu_ms": [0.1] * 3,
    }  # fmt: skip


def test_differences_are_taken_within_each_turn() -> None:
    found = _summary({"grpc": rows(10, 1.0), "httpx": rows(14, 1.1), "openai": rows(14.5, 1.15)})
    assert found["over_grpc"] == {
        "httpx": {"request_ms": 4, "token_ms": 0.1}, "openai": {"request_ms": 4.5, "token_ms": 0.15},
    }  # fmt: skip
    assert found["medians"]["grpc"] == {"request_ms": 12, "request_cpu_ms": 2, "token_ms": 1, "token_cpu_ms": 0.1}
    assert found["met"]
    assert not _summary({"grpc": rows(10, 1.0), "httpx": rows(14, 1.3)})["met"]
    assert not _summary({"grpc": rows(10, 1.0), "httpx": rows(16, 1.0)})["met"]
