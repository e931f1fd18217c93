"""What HTTP costs over gRPC: the same prompts by both in turns, as clients see them, and the head's processor time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from openai import OpenAI

from cluster.bench.http.rig import HttpHead
from cluster.client.client import Client
from cluster.client.models import TokenEvent

_PROMPT = "The code of dark river is"
_CALL_S = 300.0
REQUEST_MS, TOKEN_MS = 5.0, 0.2  # bounds of what HTTP may add

Moments = Callable[[int], list[float]]  # answers with so many tokens; returns when each piece of text came


def _by_grpc(client: Client) -> Moments:
    def answer(tokens: int) -> list[float]:
        job = client.submit(prompt=_PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True, attached=True)
        return [time.perf_counter() for event in job.stream() if isinstance(event, TokenEvent)]

    return answer


def _by_httpx(client: httpx.Client) -> Moments:
    def answer(tokens: int) -> list[float]:
        body = {"prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        moments = []
        with client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    moments.append(time.perf_counter())
        return moments

    return answer


def _by_openai(client: OpenAI) -> Moments:
    def answer(tokens: int) -> list[float]:
        stream = client.completions.create(
            model="", prompt=_PROMPT, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return [time.perf_counter() for chunk in stream if chunk.choices and chunk.choices[0].text]

    return answer


def measure_overhead(head: HttpHead, requests: int, answers: int, tokens: int, say: Callable[[str], None]) -> Any:
    """Return medians of a request with one token, and of a token of a long answer, by client, in turns.

    A request lasts until the client has its end; a token is the time from the first to the last one, by their number.
    `cpu_ms` is the processor time of the head process, in the mean.
    """
    process = psutil.Process(head.pid)

    def used() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    rows: dict[str, dict[str, list[float]]] = {}
    with (
        head.client() as grpc,
        httpx.Client(base_url=head.url, timeout=_CALL_S) as plain,
        OpenAI(base_url=f"{head.url}/v1", api_key="none", timeout=_CALL_S) as openai,
    ):
        ways = {"grpc": _by_grpc(grpc), "httpx": _by_httpx(plain), "openai": _by_openai(openai)}
        for answer in ways.values():
            answer(tokens)  # warms up
        for name in ways:
            rows[name] = {"request_ms": [], "request_cpu_ms": [], "token_ms": [], "token_cpu_ms": []}
        for _ in range(requests):
            for name, answer in ways.items():
                cpu, began = used(), time.perf_counter()
                answer(1)
                rows[name]["request_ms"].append((time.perf_counter() - began) * 1e3)
                rows[name]["request_cpu_ms"].append((used() - cpu) * 1e3)
        for number in range(answers):
            for name, answer in ways.items():
                cpu = used()
                moments = answer(tokens)
                rows[name]["token_ms"].append((moments[-1] - moments[0]) * 1e3 / (tokens - 1))
                rows[name]["token_cpu_ms"].append((used() - cpu) * 1e3 / tokens)
            say(f"answer {number + 1} of {answers}")
    return _summary(rows)


def _summary(rows: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    shown: dict[str, dict[str, float]] = {}
    for name, found in rows.items():
        shown[name] = {
            what: round(statistics.fmean(values) if "cpu" in what else statistics.median(values), 3)
            for what, values in found.items()
        }
    over: dict[str, dict[str, float]] = {}
    for name in [name for name in rows if name != "grpc"]:
        over[name] = {
            what: round(statistics.median(b - a for a, b in zip(rows["grpc"][what], rows[name][what], strict=True)), 3)
            for what in ("request_ms", "token_ms")
        }
    met = all(one["request_ms"] < REQUEST_MS and one["token_ms"] < TOKEN_MS for one in over.values())
    return {"medians": shown, "over_grpc": over, "met": met}
