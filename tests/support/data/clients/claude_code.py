"""Requests in the shape in which Claude Code sends them."""

from __future__ import annotations

from typing import Any

EPHEMERAL = {"type": "ephemeral"}
HEADERS = {
    "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "user-agent": "claude-cli/2.1.37 (external, cli)", "x-app": "cli",
}  # fmt: skip
TOOLS = [
    {
        "name": "Read",
        "description": "Reads a file from the local filesystem.",
        "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"file_path": {"type": "string"}, "limit": {"type": "number"}},
            "required": ["file_path"],
            "additionalProperties": False,
        },
    },
    {
        "name": "Bash",
        "description": "Executes a bash command.",
        "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        "cache_control": EPHEMERAL,
    },
]


def first_turn(billing: str = "fa690", **fields: Any) -> dict[str, Any]:
    """The first request of a session.

    Args:
        billing: what changes with every request in the line that comes first.
    """
    header = f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={billing};"
    reminder = "<system-reminder>\nAs you answer, you can use the following context.\n</system-reminder>"
    return {
        "model": "needle",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": reminder},
                    {"type": "text", "text": "What is in a.txt?", "cache_control": EPHEMERAL},
                ],
            }
        ],
        "system": [
            {"type": "text", "text": header},
            {"type": "text", "text": "You are Claude Code.", "cache_control": EPHEMERAL},
            {"type": "text", "text": "Be concise.", "cache_control": {**EPHEMERAL, "ttl": "1h"}},
        ],
        "tools": TOOLS,
        "metadata": {"user_id": "user_0_account__session_1"},
        "max_tokens": 32000,
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
        **fields,
    }


def second_turn(**fields: Any) -> dict[str, Any]:
    """The request after a tool has run, and another has failed."""
    body = first_turn("0b1c2")
    body["messages"] += [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I should read it.", "signature": "c2lnbmVk"},
                {"type": "redacted_thinking", "data": "AAAA"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/a.txt"}},
                {"type": "tool_use", "id": "toolu_2", "name": "Bash", "input": {"command": "cat b.txt"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "     1\thello"},
                {
                    "type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
                    "content": [{"type": "text", "text": "cat: b.txt: No such file"}], "cache_control": EPHEMERAL,
                },
                {"type": "text", "text": "<system-reminder>Go on.</system-reminder>"},
            ],
        },
    ]  # fmt: skip
    return body | fields
