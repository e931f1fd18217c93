"""Ids of responses, and functions in namespaces."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.http.core.errors import ApiError
from cluster.http.responses import names
from cluster.jobs.model import new_id
from tests.support.data.clients.codex import DOCS, SEARCH, SHELL


def test_an_id_leads_to_its_job_and_back() -> None:
    job = new_id("job")
    assert names.job_id(names.response_id(job)) == job
    assert names.call_id(job, 1) == f"call_{names.digits(job)}_1"


@pytest.mark.parametrize("value", ["", "resp_", "resp_1", f"job_{'0' * 32}", f"resp_{'g' * 32}", f"resp_{'0' * 32}\n"])
def test_what_is_no_id_is_not_found(value: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.job_id(value)
    assert caught.value.status == 404


def test_functions_of_a_namespace_have_a_name_that_is_split_again() -> None:
    tools = names.flat_tools([SHELL, SEARCH, DOCS])
    assert [(place, tool["name"]) for place, tool in tools] == [
        ("tools[0]", "shell"), ("tools[2].tools[0]", "mcp__docs__search"),
    ]  # fmt: skip
    split = names.split_names([SHELL, SEARCH, DOCS])
    assert names.function_name("mcp__docs__search", split) == {"name": "search", "namespace": "mcp__docs"}
    assert names.function_name("shell", split) == {"name": "shell"}
    plain = {**DOCS, "name": "functions"}
    assert names.flat_tools([plain])[0][1]["name"] == "search"
    assert names.function_name("search", names.split_names([plain])) == {"name": "search", "namespace": "functions"}


@pytest.mark.parametrize(("tools", "param"), [
    ([{"type": "custom", "name": "a"}], "tools[0].type"), (["a"], "tools[0].type"), ([{"type": []}], "tools[0].type"),
    ([SHELL, {"type": "mcp"}], "tools[1].type"), ([{**DOCS, "name": 1}], "tools[0].name"),
    ([{**DOCS, "tools": "x"}], "tools[0].tools"), ([{"type": "namespace", "name": "a"}], "tools[0].tools"),
    ([{**DOCS, "tools": [{"type": "custom"}]}], "tools[0].tools[0].type"),
    ([{**DOCS, "tools": [1]}], "tools[0].tools[0].type"),
])  # fmt: skip
def test_other_tools_are_refused(tools: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.flat_tools(tools)
    assert (caught.value.status, caught.value.param) == (400, param)
