"""Names in the protocol of Responses: ids that follow from the job's, and functions in namespaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.http.core.errors import ApiError, refuse
from protos.jobs.validate import show

IGNORED_TOOLS = frozenset({
    "web_search", "web_search_preview", "tool_search", "image_generation",
})  # fmt: skip
_PLAIN = "functions"  # the namespace of functions that have none
_RESPONSE_ID = re.compile(r"resp_([0-9a-f]{32})")


def response_id(job_id: str) -> str:
    """Return the id of the response that a job makes."""
    return f"resp_{digits(job_id)}"


def digits(job_id: str) -> str:
    """Return what the ids of a response, its items and its calls have in common."""
    return job_id.removeprefix("job_")


def job_id(value: str) -> str:
    """Return the id of the job behind a response. Raises ApiError (404): it is none of ours."""
    match = _RESPONSE_ID.fullmatch(value)
    if match is None:
        raise not_found(value)
    return f"job_{match[1]}"


def not_found(value: str) -> ApiError:
    """Return the error of a response that is not stored."""
    return ApiError(404, f"response {show(value)}: not found: it may have expired, or was not stored", code="not_found")


def call_id(job_id: str, index: int) -> str:
    """Return the id of a call of an answer, counted from 0."""
    return f"call_{digits(job_id)}_{index}"


def full_name(namespace: object, name: object) -> object:
    """Return the name that the model knows a function by."""
    if isinstance(namespace, str) and isinstance(name, str) and namespace not in ("", _PLAIN):
        return f"{namespace}__{name}"
    return name


def flat_tools(tools: Iterable[Any]) -> list[tuple[str, Any]]:
    """Return the tools of a request as functions, those of a namespace under their full names, with their places.

    What only OpenAI's servers run themselves is left out: clients send it with every request, and the model is not told
    of it. Raises ApiError: another type.
    """
    found: list[tuple[str, Any]] = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        place = f"tools[{index}]"
        if kind == "namespace":
            found += _members(place, tool)
        elif kind == "function":
            found.append((place, tool))
        elif not (isinstance(kind, str) and kind in IGNORED_TOOLS):
            raise refuse(f"{place}.type", f"{show(kind)}: must be function or namespace", "unsupported_value")
    return found


def _members(where: str, space: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    if not isinstance(space.get("name"), str):
        raise refuse(f"{where}.name", f"{show(space.get('name'))}: must be a text")
    if not isinstance(space.get("tools"), list):
        raise refuse(f"{where}.tools", f"{show(space.get('tools'))}: must be a list of functions")
    for index, tool in enumerate(space["tools"]):
        at = f"{where}.tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else None
            raise refuse(f"{at}.type", f"{show(kind)}: must be function", "unsupported_value")
        yield at, {**tool, "name": full_name(space.get("name"), tool.get("name"))}


def split_names(tools: Iterable[Any]) -> dict[str, tuple[str, str]]:
    """Return (namespace, name) of the functions in namespaces, by their full names."""
    return {
        str(full_name(space["name"], tool["name"])): (space["name"], tool["name"])
        for space in tools
        if space.get("type") == "namespace"
        for tool in space["tools"]
    }


def function_name(name: str, names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the fields of a call that name its function; `names` as of `split_names`."""
    if name not in names:
        return {"name": name}
    namespace, own = names[name]
    return {"name": own, "namespace": namespace}
