"""Marks `cache_control`: their time, and what is refused."""

from __future__ import annotations

import pytest

from cluster.http.anthropic.cache_control import read_cache_ttl
from cluster.http.core.errors import ApiError


@pytest.mark.parametrize(("marks", "seconds"), [
    ([], 0), ([None, None], 0), ([{"type": "ephemeral"}], 300), ([{"type": "ephemeral", "ttl": None}], 300),
    ([{"type": "ephemeral", "ttl": "5m"}, None, {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral"}], 3600),
])  # fmt: skip
def test_the_longest_time_counts(marks: list[object], seconds: int) -> None:
    assert read_cache_ttl(("cache_control", mark) for mark in marks) == seconds


@pytest.mark.parametrize(("mark", "param", "allowed"), [
    ("ephemeral", "a", "an object with type"), ({}, "a.type", "ephemeral"), ({"type": "b"}, "a.type", "ephemeral"),
    ({"type": ["ephemeral"]}, "a.type", "ephemeral"), ({"type": "ephemeral", "ttl": "2h"}, "a.ttl", "one of 5m, 1h"),
    ({"type": "ephemeral", "ttl": 300}, "a.ttl", "5m, 1h"), ({"type": "ephemeral", "ttl": []}, "a.ttl", "5m, 1h"),
])  # fmt: skip
def test_other_marks_are_refused_by_name(mark: object, param: str, allowed: str) -> None:
    with pytest.raises(ApiError, match=allowed) as caught:
        read_cache_ttl([("a", mark)])
    assert (caught.value.status, caught.value.param) == (400, param)
