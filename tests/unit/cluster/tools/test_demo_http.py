"""Whether the demonstration can ask over HTTP; that it does is shown by the integration tests."""

from __future__ import annotations

import pytest

from cluster.tools.demo_http import HttpAnswer, can_serve_http


def test_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_serve_http()
    monkeypatch.setattr("cluster.tools.demo_http.find_spec", lambda name: None)
    assert not can_serve_http()


def test_as_json() -> None:
    answer = HttpAnswer("http://127.0.0.1:8000/v1", " 42", 10, 8, 0.5, True)
    assert answer.to_json() == {
        "url": "http://127.0.0.1:8000/v1", "text": " 42", "prompt_tokens": 10, "cached_tokens": 8, "seconds": 0.5,
        "is_same": True,
    }  # fmt: skip
