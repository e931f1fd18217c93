"""The input of a response as items, and as the messages of a chat that they stand for."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.http.core.errors import ApiError, refuse
from cluster.http.responses.names import digits, full_name, function_name
from cluster.jobs.model import JobRecord
from protos.jobs.chat import ChatMessage
from protos.jobs.limits import MAX_MESSAGES
from protos.jobs.validate import check_count, show

Message = dict[str, Any]  # in the form of chat completions
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # fields by type of part
_UNSUPPORTED = "unsupported_value"


def to_messages(value: object) -> list[Message]:
    """Return the messages of `input`, a text or a list of items. Raises ApiError naming the item."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence):
        raise refuse("input", f"{show(value)}: must be a text or a list of items")
    check_count("input", len(value), MAX_MESSAGES)
    reader = _Reader()
    for index, item in enumerate(value):
        reader.read(f"input[{index}]", item)
    return reader.messages


class _Reader:
    """Joins the items of one turn of the assistant (reasoning, text, calls) to one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: Message | None = None  # the assistant's that may go on

    def read(self, key: str, item: object) -> None:
        if not isinstance(item, Mapping):
            raise refuse(key, f"{show(item)}: must be an item, an object")
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._message(key, item)
        elif kind == "reasoning":
            turn = self._turn
            if turn is None or turn["content"] or turn["tool_calls"]:
                turn = self._new_turn()
            turn["reasoning"] += _reasoning(key, item)
        elif kind == "function_call":
            self._call(key, item)
        elif kind == "function_call_output":
            self._turn = None
            output = _content(f"{key}.output", item.get("output"))
            self.messages.append({
                "role": "tool", "tool_call_id": _text(f"{key}.call_id", item.get("call_id")), "content": output,
            })  # fmt: skip
        else:
            allowed = "message, reasoning, function_call, function_call_output"
            raise refuse(f"{key}.type", f"{show(kind)}: must be one of {allowed}", _UNSUPPORTED)

    def _message(self, key: str, item: Mapping[str, Any]) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise refuse(f"{key}.role", f"{show(role)}: must be one of {', '.join(_ROLES)}")
        content = _content(f"{key}.content", item.get("content"))
        if role != "assistant":
            self._turn = None
            self.messages.append({"role": role, "content": content})
            return
        if not isinstance(content, str):
            raise refuse(f"{key}.content", "a file: must be in a message of user", _UNSUPPORTED)
        turn = self._turn
        if turn is None or turn["content"] or turn["tool_calls"]:
            turn = self._new_turn()
        turn["content"] = content

    def _call(self, key: str, item: Mapping[str, Any]) -> None:
        turn = self._turn or self._new_turn()
        name = full_name(item.get("namespace"), _text(f"{key}.name", item.get("name")))
        arguments = _text(f"{key}.arguments", item.get("arguments"))
        turn["tool_calls"].append({
            "id": _text(f"{key}.call_id", item.get("call_id")), "type": "function",
            "function": {"name": name, "arguments": arguments},
        })  # fmt: skip

    def _new_turn(self) -> Message:
        self._turn = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
        self.messages.append(self._turn)
        return self._turn


def _content(key: str, value: object) -> str | list[Message]:
    """Return a text, or with a stored file the parts of a chat message."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise refuse(key, f"{show(value)}: must be a text or a list of parts")
    parts = [_part(f"{key}[{index}]", part) for index, part in enumerate(value)]
    return parts if any(part["type"] == "file" for part in parts) else "\n".join(part["text"] for part in parts)


def _part(key: str, part: object) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and isinstance(kind, str) and kind in _TEXTS:
        name = _TEXTS[kind]
        return {"type": "text", "text": _text(f"{key}.{name}", part.get(name))}
    if isinstance(part, Mapping) and kind == "input_file":
        return _file(key, part)
    raise refuse(f"{key}.type", f"{show(kind)}: must be input_text, output_text or input_file", _UNSUPPORTED)


def _file(key: str, part: Mapping[str, Any]) -> Message:
    """Return the part of a stored file, or the text of one that comes with the request."""
    if part.get("file_url"):
        raise refuse(f"{key}.file_url", "is not fetched: upload the file and say its file_id", _UNSUPPORTED)
    if file_id := part.get("file_id"):
        return {"type": "file", "file": {"file_id": _text(f"{key}.file_id", file_id)}}
    if part.get("file_data") is None:
        raise refuse(f"{key}.file_id", "(missing): must be the id of a stored document, or file_data given")
    return {"type": "text", "text": _decode(f"{key}.file_data", _text(f"{key}.file_data", part["file_data"]))}


def _decode(key: str, data: str) -> str:
    """Return the text of a file in base64, with or without `data:` and its type before it."""
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(key, f"{show(data)}: must be base64, or data:TYPE;base64, and that") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{len(raw)} bytes: must be text in UTF-8: other files are documents, see `longreach docs`"
        raise refuse(key, problem, _UNSUPPORTED) from error


def _reasoning(key: str, item: Mapping[str, Any]) -> str:
    """Return the text of an earlier reasoning, or its summary where there is none. What is encrypted is not read."""
    for name in ("content", "summary"):
        parts = item.get(name) or ()
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise refuse(f"{key}.{name}", f"{show(parts)}: must be a list of parts")
        texts = [
            _text(f"{key}.{name}[{index}].text", part.get("text") if isinstance(part, Mapping) else None)
            for index, part in enumerate(parts)
        ]
        if texts:
            return "\n".join(texts)
    return ""


def _text(key: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise refuse(key, f"{'(missing)' if value is None else show(value)}: must be a text")


def with_instructions(messages: list[Message], instructions: str | None, has_tools: bool) -> list[Message]:
    """Return messages with the instructions before them: as a message, or before the question about a stored file."""
    if not instructions:
        return messages
    if _is_question(messages) and not has_tools:
        (message,) = messages
        return [{**message, "content": [{"type": "text", "text": instructions}, *message["content"]]}]
    return [{"role": "system", "content": instructions}, *messages]


def _is_question(messages: list[Message]) -> bool:
    """Return whether they are a question about a stored document: one message of the user with one stored file."""
    if len(messages) != 1 or messages[0]["role"] != "user" or isinstance(messages[0]["content"], str):
        return False
    files = [part["file"] for part in messages[0]["content"] if part["type"] == "file"]
    return len(files) == 1 and bool(files[0].get("file_id"))


def listed_items(record: JobRecord, instructions: str, names: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the input of a stored response as items, in their order; that of the responses it goes on from too.

    Args:
        names: namespaces and names of functions in namespaces, by the names that the model knows them by.
    """
    source, number = record.spec.input, digits(record.id)
    if source.document_id:
        (question,) = source.questions
        text = question.removeprefix(f"{instructions}\n") if instructions else question
        file = {"type": "input_file", "file_id": source.document_id}
        found = [_item("user", [file, {"type": "input_text", "text": text}])]
    else:
        messages = source.messages or ()
        found = [item for message in messages[1 if instructions else 0 :] for item in _items(message, names)]
    kinds = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
    return [{"id": f"{kinds[item['type']]}_{number}_in{index}", **item} for index, item in enumerate(found)]


def _items(message: ChatMessage, names: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    if message.role == "tool":
        output = {"call_id": message.tool_call_id, "output": message.content, "status": "completed"}
        return [{"type": "function_call_output", **output}]
    if message.role != "assistant":
        return [_item(message.role, [{"type": "input_text", "text": message.content}])]
    found: list[dict[str, Any]] = []
    if message.reasoning:
        text = {"type": "reasoning_text", "text": message.reasoning}
        found.append({"type": "reasoning", "summary": [], "content": [text], "status": "completed"})
    if message.content or not message.tool_calls:
        said: dict[str, Any] = {"type": "output_text", "text": message.content, "annotations": [], "logprobs": []}
        found.append(_item("assistant", [said]))
    return found + [
        {
            "type": "function_call", "call_id": call.id, **function_name(call.name, names),
            "arguments": call.arguments, "status": "completed",
        }
        for call in message.tool_calls
    ]  # fmt: skip


def _item(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, "status": "completed"}


def page(items: Sequence[dict[str, Any]], after: str, limit: int, newest_first: bool) -> dict[str, Any]:
    """Return a page of items as a list object. Raises ApiError: `after` is the id of none."""
    ordered = list(reversed(items)) if newest_first else list(items)
    if after:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise ApiError(400, f"after: {show(after)}: must be the id of an item of this response", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    shown = ordered[:limit]
    return {
        "object": "list", "data": shown, "has_more": len(ordered) > len(shown),
        "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None,
    }  # fmt: skip
