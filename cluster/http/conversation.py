"""Messages, tools and formats of all protocols: the input of a job, and what its answer must match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.http.core.backend import Backend
from cluster.http.core.errors import refuse
from cluster.jobs.model import JobInput
from cluster.text.tools.formats import ToolFormat
from protos.jobs import validate
from protos.jobs.chat import AUTO, check_chat
from protos.jobs.chat_values import read_messages, read_tool_choice, read_tools
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_MESSAGES


def make_conversation(
    messages: Sequence[Mapping[str, Any]], tools: object, tool_choice: object, parallel: bool | None
) -> JobInput:
    """Return messages and tools in the form of OpenAI's chat completions as input of a job. Raises InvalidRequest.

    Args:
        parallel: False for at most one call in the answer.
    """
    validate.check_count("messages", len(messages), MAX_MESSAGES)
    found = read_messages(messages)
    known = read_tools(tools)
    choice = read_tool_choice(tool_choice, parallel)
    check_chat(found, known, choice)
    return JobInput(messages=found, tools=known, tool_choice=choice if known else AUTO)


def answer_constraint(backend: Backend, asked: Constraint | None, source: JobInput) -> Constraint | None:
    """Return what an answer must match, be it for its format or for its tools. Raises ApiError, InvalidRequest.

    Args:
        asked: what its format is.
    """
    runtime = backend.runtime
    if not source.tools or source.tool_choice.mode == "none" or runtime.tool_format is ToolFormat.NONE:
        return asked
    schema = asked.schema() if asked is not None and asked.kind in ("json_schema", "json_object") else None
    if asked is not None and not isinstance(schema, dict):
        problem = 'must be a JSON schema beside tools that may be called: leave one out, or say tool_choice "none"'
        raise refuse("structured_outputs", problem)
    grammar = runtime.call_grammar(source.tools, source.tool_choice, schema if isinstance(schema, dict) else None)
    return Constraint("grammar", grammar) if grammar is not None else None
