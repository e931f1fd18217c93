"""Valid requests of every POST route, as clients send them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BOUNDARY = "7f3a9c51d2e84b06"
_JSON = "application/json"
_WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["town"],
        "additionalProperties": False,
    },
}
_CHAT_TOOL = {"type": "function", "function": {**_WEATHER, "strict": True}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
_RECORD = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}
_ANTHROPIC_TOOL = {"name": "weather", "description": "Tells it.", "input_schema": _WEATHER["parameters"]}
_ANTHROPIC: dict[str, Any] = {
    "model": "<model>", "max_tokens": 3, "system": [{"type": "text", "text": "Be brief."}], "tools": [_ANTHROPIC_TOOL],
    "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "stop_sequences": ["END"],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"town": "a"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]},
    ],
}  # fmt: skip
BATCH_LINE = {
    "custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """A request.

    Attributes:
        path: with `{document}` and the like for objects of the head.
        body: its JSON, or bytes of another type.
    """

    path: str
    body: Any
    content_type: str = _JSON

    def with_objects(self, objects: Mapping[str, str]) -> Recorded:
        """Return the request about objects that are there; `objects` has their ids by kind."""
        path, body = self.path, self.body if isinstance(self.body, bytes) else json.dumps(self.body)
        for kind, value in objects.items():
            path = path.replace(f"{{{kind}}}", value)
            if isinstance(body, str):
                body = body.replace(f"<{kind}>", value)
        return Recorded(path, json.loads(body) if isinstance(body, str) else body, self.content_type)


def form(content: bytes, purpose: str, name: str = "notes.txt") -> bytes:
    """Return a form that uploads a file."""
    parts = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'.encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'.encode(),
        b"Content-Type: text/plain\r\n\r\n" + content + f"\r\n--{BOUNDARY}--\r\n".encode(),
    )
    return b"".join(parts)


_FORM = f"multipart/form-data; boundary={BOUNDARY}"
_CHATS: tuple[dict[str, Any], ...] = (
    {
        "model": "<model>", "stream": True, "stream_options": {"include_usage": True}, "return_progress": True,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], "max_tokens": 3,
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["END"], "user": "u",
    },
    {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "file", "file": {"file_id": "<file>"}}, {"type": "text", "text": "What is the code?"},
            ]},
        ],
        "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "metadata": {"a": "b"}, "priority": 1,
        "cache_salt": "s", "request_id": "r", "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "reasoning": "a tool", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
        "tools": [_CHAT_TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "max_tokens": 3, "stream": True,
    },
    {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 1, "logit_bias": {},
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "strict": True, "schema": _RECORD}},
    },
    {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "tools": [_CHAT_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "structured_outputs": {"regex": "[a-z]{1,3}"}},
)  # fmt: skip
_RESPONSES: tuple[dict[str, Any], ...] = (
    {
        "model": "<model>", "instructions": "Be brief.", "stream": True, "store": False, "max_output_tokens": 3,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {"a": "b"},
        "reasoning": {"effort": "medium", "summary": "auto"}, "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False, **_WEATHER}],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "a tool"}]},
            {"type": "function_call", "name": "weather", "arguments": '{"town": "Ulm"}', "call_id": "c1"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
    },
    {
        "input": [{"role": "user", "content": [
            {"type": "input_file", "file_id": "<file>"}, {"type": "input_text", "text": "What is the code?"},
        ]}],
        "background": True, "store": True, "max_output_tokens": 2, "metadata": {"a": "b"},
    },
    {
        "input": "hi", "max_output_tokens": 3, "temperature": 0.5, "top_logprobs": 0,
        "text": {"format": {"type": "json_schema", "name": "r", "schema": _RECORD}},
    },
    {"input": "and then?", "previous_response_id": "<response>", "max_output_tokens": 2},
)  # fmt: skip
_JOBS: tuple[dict[str, Any], ...] = (
    {"document_id": "<document>", "questions": ["What is the code?"], "max_tokens": 2, "deadline_s": 30.0},
    {"document": "The code is 4711.", "questions": ["a", "b"], "max_tokens": 2, "labels": {"a": "b"}, "priority": 1},
    {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "tools": [_CHAT_TOOL], "tool_choice": "auto",
        "stop": ["END"], "logprobs": 2, "seed": 3, "idempotency_key": "<key>",
    },
    {"token_ids": [5, 6, 7], "max_tokens": 2, "ignore_eos": True, "structured_outputs": {"choice": ["a", "b"]}},
)  # fmt: skip
RECORDED: tuple[Recorded, ...] = (
    *(Recorded("/v1/chat/completions", body) for body in _CHATS),
    Recorded("/v1/completions", {"prompt": ["hi", "there"], "max_tokens": 2, "logprobs": 1, "stream": True}),
    Recorded("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, "echo": True, "suffix": ""}),
    *(Recorded("/v1/responses", body) for body in _RESPONSES),
    Recorded("/v1/responses/{response}/cancel", {}),
    Recorded("/v1/messages", {**_ANTHROPIC, "stream": True}),
    Recorded("/v1/messages", {**_ANTHROPIC, "tool_choice": {"type": "any"}}),
    Recorded("/v1/messages/count_tokens", _ANTHROPIC),
    Recorded("/tokenize", {"prompt": "hi", "return_token_strs": True}),
    Recorded("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "tools": [_CHAT_TOOL]}),
    Recorded("/detokenize", {"tokens": [5, 6, 7]}),
    Recorded("/v1/files", form(b"The code is 4711.", "user_data"), _FORM),
    Recorded("/v1/files", form(json.dumps(BATCH_LINE).encode(), "batch", "lines.jsonl"), _FORM),
    Recorded("/v1/batches", {"input_file_id": "<lines>", "endpoint": "/v1/chat/completions", "metadata": {"a": "b"}}),
    Recorded("/v1/batches/{batch}/cancel", {}),
    *(Recorded("/v1/jobs", body) for body in _JOBS),
    Recorded("/v1/jobs/{job}/cancel", {}),
    Recorded("/v1/documents?name=notes", b"The code is 4711.", "text/plain"),
    Recorded("/v1/documents/{document}/append?name=more", b" It is secret.", "text/plain"),
    Recorded("/v1/documents/{document}/read", {}),
    Recorded("/v1/documents/{document}/pin", {"pinned": True}),
    Recorded("/v1/documents/import", b"manifest.json" + bytes(600), "application/x-tar"),
)
