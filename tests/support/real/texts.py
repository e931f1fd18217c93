"""Prompts with something to say after them, and strings that tokenizers disagree about."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in three sentences why the sky is blue.",
    "List five uses of a paper clip.",
    "What is the difference between a list and a tuple in Python?",
    "Translate 'good morning, my friend' into Spanish and German.",
    "How many legs do three spiders and two ants have together? Think step by step.",
    "Give me a short recipe for pancakes.",
    "Summarize the story of Romeo and Juliet in a few sentences.",
    "Write a SQL query that counts orders by customer for the year 2023.",
)
BEGINNINGS = (
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "The three laws of motion are:\n\n1.",
    'def quicksort(items):\n    """Return the items in order."""\n',
    "import json\n\n\nclass Settings:\n    def __init__(self, path):\n",
    "1, 2, 4, 8, 16, 32,",
    "| Country | Capital |\n|---|---|\n| France | Paris |\n| Germany |",
    "Dear Sir or Madam,\n\nI am writing to you about",
    "<html>\n<head>\n<title>Welcome</title>\n",
    "La tour Eiffel est",
    "Photosynthesis is the process by which",
)

CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "  a\n\nb  "},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "naïve 日本語 😀"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "\n"}, {"role": "assistant", "content": " x"},
     {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"}],
)  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

_STRINGS = (
    "", " ", "  ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\n \n", "a", " a", "a ", "  a", "a  b", "a\tb", "a\r\nb",
    "Hello, world!", "hello world", "HELLO", "it's we'll I'd you've they're I'm can't", "IT'S WE'LL I'D", "'s 'S 't",
    "0", "12", "123", "1234567890", "3.14159", "1,000,000", "-1e-10", "0x1F", "²³", "½", "١٢٣", "１２３", "Ⅷ",
    "a1b2c3", "v2.0.1-rc3", "foo_bar", "fooBar", "FOO_BAR_BAZ", "__init__", "x+=1;", "a->b::c", "!!!???", "...---...",
    "#include <stdio.h>\n\nint main(void) {\n\treturn 0;\n}\n", "for i in range(10):\n    print(i)\n\n\n",
    "{\"a\": [1, 2, {\"b\": null}]}", "<a href='x'>y</a>", "SELECT * FROM t WHERE a='b';", "https://example.org/a?b=c#d",
    "a@b.org", "$100.00", "50%", "C:\\Users\\x", "~/.bashrc", "\\n\\t", "`code`", "**bold** _it_", "- a\n- b\n  - c\n",
    "é", "e\u0301", "ñandú", "Ångström", "A\u030angstro\u0308m", "naïve café", "straße", "İstanbul", "ǅ", "ﬁ",
    "日本語のテキスト", "中文，标点。", "한국어",
    "\u1112\u1161\u11ab", "עברית", "العربية", "ภาษาไทย",
    "हिन्दी", "Ελληνικά", "Русский",
    "😀", "👨‍👩‍👧", "🏳️‍🌈", "🇫🇷", "a😀b",
    " 😀 ", "\u200b", "\u200d", "\ufeff", "\u00a0", "a\u00a0b", "\u2003x", "\u3000x",
    "\u2028", "\u0085", "\x00", "\x01\x02", "\x7f", "\ufffd", "\U0010ffff", "\ue000",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a<|im_end|>b", "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|",
    "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>", "<|im_end|><|im_end|>", " <|im_end|> ",
    "<tool_call>\n{}</tool_call>",
    "a" * 100, "ab" * 60, " " * 33, "\n" * 17, "1" * 40, "!" * 30, "é" * 20,
    "日" * 20, "😀" * 9, "\t" * 11, " \t" * 8,
)  # fmt: skip
_PIECES = (
    *" \t\n", "  ", "\r\n", "a", "The", "é", "e\u0301", "ß", "日本", "語", "한", "😀", "👍🏽",
    "1", "23", "²", "１", "'s", "'LL", "'",
    "\"", ".", ",", "!?", "-", "_", "<", ">", "|", "\\", "/", "the", " of", "def", "\u00a0",
    "\u200d", "Ж", "ع", "<|im_end|>",
)  # fmt: skip


def awkward_strings(count: int = 300, seed: int = 1) -> list[str]:
    """Return the strings above and random ones after them."""
    generator = random.Random(seed)
    made = ["".join(generator.choices(_PIECES, k=generator.randint(2, 12))) for _ in range(count - len(_STRINGS))]
    return [*_STRINGS, *made]


def is_nfc(text: str) -> bool:
    """Return whether normalizing the text changes nothing."""
    return unicodedata.is_normalized("NFC", text)
