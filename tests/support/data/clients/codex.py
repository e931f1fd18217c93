"""Bodies of `POST /v1/responses` in the shapes that Codex sends: twelve fields, none of them about sampling."""

from __future__ import annotations

import copy
from typing import Any

SHELL = {
    "type": "function",
    "name": "shell",
    "description": "Runs a shell command and returns its output.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "The command to execute"},
            "workdir": {"type": "string"},
            "timeout_ms": {"type": "number"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
PLAN = {
    "type": "function",
    "name": "update_plan",
    "description": "Updates the task plan.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"plan": {"type": "array", "items": {"type": "object"}}},
        "required": ["plan"],
        "additionalProperties": False,
    },
}
DOCS = {  # how the tools of an MCP server come
    "type": "namespace",
    "name": "mcp__docs",
    "description": "Tools of the server docs.",
    "tools": [
        {
            "type": "function",
            "name": "search",
            "description": "Search the documentation.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        }
    ],
}
SEARCH = {"type": "web_search", "external_web_access": False}

_FIRST: dict[str, Any] = {
    "model": "needle",
    "instructions": "You are Codex, a coding agent running in the Codex CLI on a user's computer.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [
                {"type": "input_text", "text": "<permissions instructions>read-only</permissions instructions>"}
            ],
        },
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "<environment_context>\n  <cwd>/repo</cwd>\n</environment_context>"}
            ],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Which files are here?"}]},
    ],
    "tools": [SHELL, PLAN, SEARCH, DOCS],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199c2b5-6a41-7c02-9d0f-6e1b8f6f3a10",
    "client_metadata": {"x-codex-installation-id": "6f1d2c5e-0f58-4f7e-8e43-1d0e0c9c2a77"},
}


def first_request() -> dict[str, Any]:
    """The first request of a session."""
    return copy.deepcopy(_FIRST)


def request_after_calls() -> dict[str, Any]:
    """The next one: with the reasoning, text and calls of the answer, as it had them, and what the calls gave."""
    body = first_request()
    body["input"] += [
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I should list them."}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I will look."}],
        },
        {
            "type": "function_call",
            "name": "shell",
            "arguments": '{"command":["bash","-lc","ls"]}',
            "call_id": "call_1_0",
        },
        {
            "type": "function_call",
            "namespace": "mcp__docs",
            "name": "search",
            "arguments": '{"query":"files"}',
            "call_id": "call_1_1",
        },
        {"type": "function_call_output", "call_id": "call_1_0", "output": "Exit code: 0\nOutput:\nREADME.md\n"},
        {
            "type": "function_call_output",
            "call_id": "call_1_1",
            "output": [{"type": "input_text", "text": "nothing found"}],
        },
    ]
    return body
