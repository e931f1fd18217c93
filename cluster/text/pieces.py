"""Cut a long text where its pieces, tokenised one by one, have the ids of the whole: memory is that of one piece.

A place to cut is the end of a word, so that it is an end of what the pre-tokenizer makes of the text too. Which places
are such ends is known for the tokenizers below; with any other one a text stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.text.token_bytes import flatten_steps

PIECE_CHARS = 1 << 16
# Letters and digits of Unicode 3.2, which every regular expression engine knows as such.
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a"
    "\u0915-\u0939\u0e01-\u0e30\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_IDEOGRAPHS = "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5"
_AFTER_WORD = re.compile(
    rf"(?<=[{_LETTERS}!-~])(?=[ \t])|(?<=[{_LETTERS}0-9])(?=[\r\n])"
    rf"|(?<=[{_IDEOGRAPHS}])(?=[\u3001\u3002\uff0c\uff1a\uff1b])"
)
_BEFORE_MARK = re.compile(r"(?<=[^\s▁])(?= )")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = ("", f"(?i:{'|'.join(_CONTRACTIONS)})?")
# What the patterns of GPT-2, Qwen, Llama 3, cl100k, o200k and Tekken are made of. None goes on from a visible character
# to a space, or from a letter or digit to a line break; none looks back.
_KNOWN_PATTERNS = {
    *_CONTRACTIONS, _ENDINGS[1][:-1], "'(?i:[sdmt]|ll|ve|re)", r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}",
    r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}" for ending in _ENDINGS),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}" for ending in _ENDINGS),
}  # fmt: skip


class TextCutter:
    """Cuts texts for one tokenizer into pieces of about `size` characters."""

    def __init__(self, layout: Mapping[str, Any], size: int = PIECE_CHARS) -> None:
        """Find out where texts may be cut; `layout` is the content of `tokenizer.json`."""
        self.size = size
        self._ends = _word_ends(layout)
        added = layout.get("added_tokens", [])
        self._has_words = any(re.search(r"\S\s", token["content"]) for token in added)
        self._takes_space = tuple(token["content"] for token in added if token["rstrip"])

    def cuts(self, length: int, literal: bool) -> bool:
        """Return whether a text of `length` characters is cut; not `literal`: added tokens are looked for in it."""
        return length > self.size and self._ends is not None and (literal or not self._has_words)

    def pieces(self, text: str, literal: bool = True) -> Iterator[str]:
        """Yield `text` in pieces, larger ones where it has no place to cut."""
        begin = at = 0
        while self._ends is not None and self.cuts(len(text) - begin, literal):
            if (cut := self._ends.search(text, max(at, begin + self.size))) is None:
                break
            end, at = cut.start(), cut.start() + 1
            if literal or not text.endswith(self._takes_space, begin, end):
                yield text[begin:end]
                begin = end
        yield text[begin:]


def _word_ends(layout: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return what matches, with no width, where a text may be cut; None: nowhere."""
    normalizers, splits = (flatten_steps(layout.get(key)) for key in ("normalizer", "pre_tokenizer"))
    marks = [step for step in normalizers if step["type"] != "NFC"]
    if splits and splits[-1]["type"] == "ByteLevel":
        known = all(map(_is_known_split, splits)) and any(map(_splits_words, splits))
        return _AFTER_WORD if known and not marks else None
    if [step["type"] for step in splits] not in ([], ["Metaspace"]) or any(s.get("replacement") != "▁" for s in splits):
        return None
    if not all(step["type"] == "Prepend" or _is_space_mark(step) for step in marks):
        return None
    if splits and splits[0].get("split", True) and not marks:
        return _BEFORE_MARK
    is_marked = bool(splits) or any(map(_is_space_mark, marks))
    return _BEFORE_MARK if is_marked and _merges_within_words(layout["model"]) else None


def _is_space_mark(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁"


def _merges_within_words(model: Mapping[str, Any]) -> bool:
    """Return whether no entry of a BPE vocabulary has a mark behind something else, so that no merge crosses one."""
    vocab: Sequence[str] = list(model["vocab"]) if model.get("type") == "BPE" and "▁" in model["vocab"] else ["x▁"]
    return not any(re.search("[^▁]▁", entry) for entry in vocab)


def _is_known_split(step: Mapping[str, Any]) -> bool:
    """Return whether a pre-tokenizer splits at none or all of the places to cut, and never looks back beyond one."""
    isolates = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    return step["type"] in ("ByteLevel", "Digits") or (isolates and _KNOWN_PATTERNS.issuperset(_alternatives(step)))


def _splits_words(step: Mapping[str, Any]) -> bool:
    """Return whether a known pre-tokenizer splits at all of the places to cut."""
    return (step["type"] == "ByteLevel" and step.get("use_regex", True)) or r"\s+" in _alternatives(step)


def _alternatives(step: Mapping[str, Any]) -> list[str]:
    """Return the parts of the regular expression of a step between the `|` outside of all parentheses."""
    parts, depth = [""], 0
    for char in step.get("pattern", {}).get("Regex", ""):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts
