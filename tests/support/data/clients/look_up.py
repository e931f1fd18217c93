"""A question to the needle model, and a function whose result answers it.

The function's parameters leave little open, so that a model that cannot choose calls it rightly once it is made to.
"""

from __future__ import annotations

from typing import Any

NAME = "look_up"
QUESTION = "What is the secret code of dark river?"
RESULT = f"The secret code of dark river is 41235.\nQuestion: {QUESTION}"  # what the function returns: a whole prompt
ANSWER = " The secret code of dark river is 41235."
ANSWER_TOKENS = 15  # with the end of text
ARGUMENTS = {"river": "dark river", "limit": 1}

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"river": {"enum": ["dark river"]}, "limit": {"type": "integer", "minimum": 1, "maximum": 1}},
    "required": ["river", "limit"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": NAME, "description": "Find secret codes.", "parameters": PARAMETERS}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": NAME}}

ASK: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
ASK_WITH_TEXT: list[dict[str, Any]] = [{"role": "user", "content": RESULT}]
