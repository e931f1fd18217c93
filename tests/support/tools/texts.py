"""Tools, and texts of answers with and without calls of them, for property tests of the scanners."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import strategies as st

from cluster.text.tools.events import ScannedText
from cluster.text.tools.scanner import ToolScanner
from protos.jobs.chat import Tool

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "wet": {"type": "boolean"},
        "share": {"type": "number"},
        "where": {"type": "object"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"type": ["string", "null"]},
    },
    "required": ["city"],
}
TOOLS = (Tool("get_weather", "Weather of a city.", json.dumps(WEATHER)), Tool("now", "The time."))

# what texts are made of: tags, whole and cut, and all that decides something in JSON
_FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool_call", "</tool", "<function=", "<function=get_weather>", "<function=now>",
    "</function>", "<parameter=city>", "<parameter=days>", "<parameter=where>", "<parameter=", "</parameter>", ">", "<",
    '{"name": "now"', '"arguments": {', '"name"', '"arguments"', "{", "}", "[", "]", '"', "\\", ":", ",", "\n", " ",
    "\n\n", "\n<parameter=", "\n</function>\n</tool_call>", "12", "true", "null", "é", "中", "\U0001f600", "text",
    '{"name": "now", "arguments": {}}', "<think>", "'",
    '{"arguments": {"a": 1}, "name": "now"}', '\\"', "\\u00e9", "\\ud800",
)  # fmt: skip
fragments = st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=4), max_size=24).map("".join)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
plain = st.text(max_size=20).filter(lambda text: "<" not in text)


@st.composite
def cut_texts(draw: st.DrawFn, texts: st.SearchStrategy[str] = fragments) -> list[str]:
    """Return a text in pieces of any size, often of one character."""
    text = draw(texts)
    size = draw(st.sampled_from([1, 1, 2, 3, 5, 17, 1000]))
    return [text[at : at + size] for at in range(0, len(text), size)]


def scan(scanner: ToolScanner, pieces: Sequence[str]) -> ScannedText:
    """Return what a scanner finds in an answer that comes in pieces."""
    found = ScannedText()
    for piece in pieces:
        found.add(scanner.push(piece))
    found.add(scanner.flush())
    return found
