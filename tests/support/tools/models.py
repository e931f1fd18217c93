"""Tokenizers with the chat templates and added tokens of Qwen3 and Qwen3-Coder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from cluster.text.tokenizer import TextTokenizer
from tests.support import paths

ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_HERE = Path(__file__).parent
QWEN3 = (_HERE / "qwen3.jinja").read_text()
NEEDLE_WITH_TOOLS = (_HERE / "needle.jinja").read_text()  # what the needle model understands, with calls and results
QWEN3_CODER = (_HERE / "qwen3_coder.jinja").read_text()


def with_tool_tokens(template: str) -> TextTokenizer:
    """Return the needle model's tokenizer with the tokens of Qwen3 that are added and not special."""
    tokenizer = Tokenizer.from_str((paths.NEEDLE / "tokenizer.json").read_text())
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return TextTokenizer(tokenizer.to_str().encode(), {}, template)


def control_tokens(tokenizer: TextTokenizer, ids: list[int]) -> Counter[str]:
    """Return how often each added token is there."""
    names = [tokenizer.id_to_token(token_id) or "" for token_id in ids]
    return Counter(name for name in names if name in tokenizer.added_texts)
