from __future__ import annotations

import pytest

from protos.errors import InvalidRequest
from protos.jobs import limits
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice, check_chat

HI = ChatMessage("user", "hi")


def test_a_conversation_with_tools() -> None:
    call = ToolCall("c1", "get_weather", '{"city": ')  # it broke off
    messages = [
        ChatMessage("system"), HI, ChatMessage("assistant", "", "hm", (call, call)),
        ChatMessage("tool", "", tool_call_id="c1", name="get_weather"),
    ]  # fmt: skip
    tools = [Tool("get_weather", "", '{"type": "object"}'), Tool("a.b-C_9", strict=True)]
    for choice in (ToolChoice(), ToolChoice("none"), ToolChoice("required", "", True), ToolChoice("named", "a.b-C_9")):
        check_chat(messages, tools, choice)
    check_chat([HI], [], ToolChoice("none"))
    check_chat([HI] * limits.MAX_MESSAGES, [Tool(f"t{index}") for index in range(limits.MAX_TOOLS)])


BAD = [
    ([], [], ToolChoice(), "messages: empty: must have at least one"),
    ([HI] * 4097, [], ToolChoice(), "messages: 4097: must be at most 4096"),
    ([HI, ChatMessage("king")], [], ToolChoice(), "messages[1].role: 'king': must be one of system, user, assistant"),
    ([ChatMessage("user", "", "hm")], [], ToolChoice(), "messages[0].reasoning: of a message of user: must be"),
    ([ChatMessage("tool", tool_calls=(ToolCall("", "f"),))], [], ToolChoice(), "messages[0].tool_calls: of a message"),
    ([ChatMessage("assistant", tool_calls=(ToolCall("", ""),))], [], ToolChoice(), "messages[0].tool_calls[0].name: 0"),
    ([ChatMessage("assistant", tool_calls=(ToolCall("", "f"),) * 513)], [], ToolChoice(), "messages[0].tool_calls: 51"),
    ([ChatMessage("tool", tool_call_id="c" * 257)], [], ToolChoice(), "messages[0].tool_call_id: 257 characters"),
    ([HI], [Tool("f")] * 513, ToolChoice(), "tools: 513: must be at most 512"),
    ([HI], [Tool("f"), Tool("f")], ToolChoice(), "tools[1].name: f: is another tool's: must be unique"),
    ([HI], [Tool("f g")], ToolChoice(), "tools[0].name: 'f g': must be 1 to 128 letters"),
    ([HI], [Tool("")], ToolChoice(), "tools[0].name: '': must be"),
    ([HI], [Tool("f", "", "[]")], ToolChoice(), "tools[0].parameters: '[]': must be a JSON schema, an object"),
    ([HI], [Tool("f", "", "{")], ToolChoice(), "tools[0].parameters: '{': must be a JSON schema, an object"),
    ([HI], [Tool("f", "", "[" * 9999)], ToolChoice(), "tools[0].parameters: "),
    ([HI], [Tool("f")], ToolChoice("maybe"), "tool_choice: 'maybe': must be one of auto, none, required, named"),
    ([HI], [Tool("f")], ToolChoice("named", "g"), "tool_choice: 'g': must be the name of one of the tools"),
    ([HI], [], ToolChoice("required"), "tool_choice: required: must have tools"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "tools", "choice", "said"), BAD, ids=range(len(BAD)))
def test_what_does_not_keep_the_limits(
    messages: list[ChatMessage], tools: list[Tool], choice: ToolChoice, said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_chat(messages, tools, choice)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
