"""The demonstration's question over HTTP: the door that clients of OpenAI's protocols use."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.engine.runtime import ClusterRuntime
from cluster.server.head import HTTP_PACKAGES, Head


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A completion as `POST /v1/completions` returned it."""

    url: str  # of the API: what clients take as their base URL
    text: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt, which were not computed again
    seconds: float
    is_same: bool  # as the answer of the cluster

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def can_serve_http() -> bool:
    """Return whether the extra `http` is installed."""
    return all(map(find_spec, HTTP_PACKAGES))


def ask_over_http(runtime: ClusterRuntime, prompt: Sequence[int], expected: str, max_tokens: int) -> HttpAnswer:
    """Serve a running cluster on a free port of this machine, continue token ids greedily, and stop serving.

    Args:
        expected: what the cluster answered.
    """
    with tempfile.TemporaryDirectory(prefix="longreach-demo-") as folder:
        config = runtime.deployment.config.model_copy(update={"data_dir": Path(folder)})
        head = Head(replace(runtime.deployment, config=config), runtime=runtime, port=0, http_port=0)
        head.start()
        try:
            url = f"{head.service.http_url}/v1"
            body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            began = time.monotonic()
            # no proxy of the environment: it is this machine
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
                answer = json.load(reply)
            seconds = time.monotonic() - began
        finally:
            head.close()
    usage = answer["usage"]
    text, cached = answer["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]
    return HttpAnswer(url, text, usage["prompt_tokens"], cached, round(seconds, 3), text == expected)
