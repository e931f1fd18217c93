"""The demonstration's question over HTTP: asked of a runtime that runs, which goes on, and nothing stays."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.tools.demo_http import ask_over_http
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime

PROMPT = list(range(5, 205))


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[FakeRuntime]:
    made = FakeRuntime(tmp_path / "own")
    made.start()
    yield made
    made.close()


def test_the_same_answer_and_a_cached_prompt(
    runtime: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is this machine: no proxy is asked
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = AnswerOptions(max_tokens=4)
    text = runtime.generate([PROMPT], options)[0].text
    again = ask_over_http(runtime, PROMPT, text, 4)
    assert (again.is_same, again.text, again.prompt_tokens, again.cached_tokens) == (True, text, 200, 192)
    assert again.seconds < 60
    assert again.url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(again.url, timeout=5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("longreach-demo-")) == []
    assert runtime.generate([PROMPT], options)[0].text == text
    assert not ask_over_http(runtime, PROMPT, "something else", 4).is_same
