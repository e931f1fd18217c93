"""Messages, tools and formats as input of a job, for every protocol."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.http.conversation import answer_constraint, make_conversation
from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError
from cluster.jobs.model import JobInput
from protos.jobs.chat import AUTO, ChatMessage, ToolChoice
from protos.jobs.constraint import Constraint
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": "f", "parameters": {"type": "object"}}]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_backend(FakeJobService())
    yield made
    made.close()


def test_a_choice_without_tools_is_none() -> None:
    source = make_conversation(USER, None, "none", False)
    assert source == JobInput(messages=(ChatMessage("user", "hi"),), tool_choice=AUTO)
    assert make_conversation(USER, TOOLS, "auto", False).tool_choice == ToolChoice(one_call=True)


def test_what_an_answer_must_match(backend: Backend) -> None:
    plain, auto, must = (make_conversation(USER, tools, choice, None) for tools, choice in (
        (None, None), (TOOLS, "auto"), (TOOLS, "required"),
    ))  # fmt: skip
    schema, regex = Constraint("json_object"), Constraint("regex", "a+")
    assert answer_constraint(backend, regex, plain) == regex
    assert answer_constraint(backend, None, auto) is None
    for asked, source in ((None, must), (schema, auto)):
        constraint = answer_constraint(backend, asked, source)
        assert constraint is not None
        assert constraint.kind == "grammar"
    with pytest.raises(ApiError, match="beside tools"):
        answer_constraint(backend, regex, auto)
