"""An OpenAI-compatible server as a peer: token ids in, a stream of tokens out. Standard library only."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cluster.common.text_format import one_line
from protos.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
_TIMEOUT_S = 3600.0


class OpenAiPeer:
    """Asks `/completions` of one server."""

    def __init__(self, name: str, url: str, model: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: `model` is the server's name for it; empty: the first that it lists."""
        self._name = name
        self._url = url.rstrip("/")
        self._clock = clock
        self._extensions: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
        self.model = model or self._first_model()

    def measure(self, ids: Sequence[int], decode: int) -> dict[str, Any]:
        """Return `first_token_s`, and `decode_ms` where at least two tokens came, of one prompt. Raises UserError."""
        body = {
            "model": self.model, "prompt": list(ids), "max_tokens": 1 + decode, "temperature": 0.0, "stream": True,
        }  # fmt: skip
        began = self._clock()
        with self._post("/completions", body) as response:
            times, usage = read_stream(response, self._clock)
        if not times:
            raise UserError(f"peers: {self._name}: {self._url}: no token came")
        tokens = int(usage.get("completion_tokens") or len(times))
        found: dict[str, Any] = {"first_token_s": times[0] - began, "tokens": tokens}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached:
            found["cached_tokens"] = cached
        if tokens > 1:
            found["decode_ms"] = (times[-1] - times[0]) / (tokens - 1) * 1e3
        return found

    def _first_model(self) -> str:
        with self._open(urllib.request.Request(f"{self._url}/models", headers=_headers())) as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"peers: {self._name}: {self._url}/models: lists no model: set `model`") from error

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Post a body; what a server refuses of the extensions is left out from then on."""
        while True:
            data = json.dumps({**body, **self._extensions}).encode()
            request = urllib.request.Request(self._url + path, data, _headers())
            try:
                return self._open(request)
            except _Refused as refusal:
                unknown = [name for name in self._extensions if name in str(refusal)]
                if not unknown:
                    raise UserError(str(refusal)) from refusal
                for name in unknown:
                    del self._extensions[name]

    def _open(self, request: urllib.request.Request) -> Any:
        where = f"peers: {self._name}: {request.full_url}"
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            text = one_line(error.read(4096).decode(errors="replace"), 300)
            if error.code in (400, 422):
                raise _Refused(f"{where}: {error.code}: {text}") from error
            raise UserError(f"{where}: {error.code}: {text}") from error
        except OSError as error:
            raise UserError(f"{where}: cannot be reached ({one_line(error, 100)}): start the server first") from error


class _Refused(Exception):
    """A request that the server finds wrong."""


def read_stream(lines: Iterable[bytes], clock: Callable[[], float]) -> tuple[list[float], dict[str, Any]]:
    """Return when each piece of an answer came, and the usage that the server says; {} if it does not."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    for event in _events(lines):
        choices = event.get("choices") or []
        if choices and choices[0].get("text") is not None and not _is_end(choices[0]):
            times.append(clock())
        usage = event.get("usage") or usage
    return times, usage


def _is_end(choice: dict[str, Any]) -> bool:
    """Return whether a piece says only why the answer ended."""
    return not choice["text"] and choice.get("finish_reason") is not None


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
