"""Marks `cache_control`: how long what is computed of a prompt is protected, wherever in the request they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.http.core.errors import refuse
from protos.jobs.validate import show

_TTL_S = {"5m": 300, "1h": 3600}


def read_cache_ttl(marks: Iterable[tuple[str, object]]) -> int:
    """Return the longest time of marks in seconds, 0 without any.

    Args:
        marks: (name of the field, its value); None is no mark.

    Raises:
        ApiError: a mark has another type than `ephemeral`, or another `ttl` than 5m and 1h.
    """
    return max((_read(where, mark) for where, mark in marks if mark is not None), default=0)


def _read(where: str, mark: object) -> int:
    if not isinstance(mark, Mapping):
        raise refuse(where, f"{show(mark)}: must be an object with type")
    if mark.get("type") != "ephemeral":
        raise refuse(f"{where}.type", f"{show(mark.get('type'))}: must be ephemeral")
    ttl = mark.get("ttl")
    if ttl is not None and (not isinstance(ttl, str) or ttl not in _TTL_S):
        raise refuse(f"{where}.ttl", f"{show(ttl)}: must be one of {', '.join(_TTL_S)}")
    return _TTL_S[ttl or "5m"]
