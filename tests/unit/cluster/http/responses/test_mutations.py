"""Bodies that were damaged in any way are answered or refused, and never make the head fail."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from typing import Any

import pytest

from tests.support.data.clients.codex import request_after_calls
from tests.support.rigs.http import AnsweringService, direct_client

VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, "", "x", "\x00", "auto", "function", "namespace", "message", [], [[]], ["x"], {},
    {"type": "x"}, {"type": "function"}, {"type": "namespace"}, {"type": "json_schema", "schema": {}},
    {"role": "user", "content": "a"}, "resp_" + "0" * 32, float("nan"), 10**40,
]  # fmt: skip
FIELDS: dict[str, Any] = {
    "text": {"format": {"type": "json_object"}}, "metadata": {"a": "b"}, "max_output_tokens": 5, "background": False,
    "previous_response_id": None, "temperature": 0.5, "user": "u", "structured_outputs": None, "top_logprobs": 0,
}  # fmt: skip


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*where, key), *places(item, (*where, key)))]


def mutated(noise: random.Random) -> dict[str, Any]:
    body = request_after_calls() | json.loads(json.dumps(FIELDS))
    for _ in range(noise.randint(1, 3)):
        *path, last = noise.choice(places(body))
        inside: Any = body
        for key in path:
            inside = inside[key]
        if noise.random() < 0.25:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(noise.choice(VALUES))
    return body


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bodies(seed: int) -> None:
    noise = random.Random(seed)

    async def run() -> set[int]:
        found = set()
        with direct_client(AnsweringService()) as client:
            for _ in range(100):
                body = json.dumps(mutated(noise))
                answer = await client.post("/v1/responses", content=body)
                assert answer.status_code in (200, 400, 404), (answer.text, body)
                assert "internal_error" not in answer.text
                found.add(answer.status_code)
        return found

    assert {200, 400} <= asyncio.run(run())
