"""Lines of input files of batches."""

from __future__ import annotations

from typing import Any


def chat(custom_id: str, text: str = "hi", **body: Any) -> dict[str, Any]:
    """A line of an input file."""
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": asked}
