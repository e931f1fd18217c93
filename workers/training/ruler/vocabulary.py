"""The tokenizer of the checkpoint: that of the needle checkpoint, with the words of the tasks as single tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROW_MULTIPLE = 64  # of the vocabulary's rows in the model
CAPITALS = r"[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"
_SENTENCES = (
    "One of the special magic numbers for", " Some special magic numbers are hidden within the following text.",
    "A special magic number is hidden", " What are all the special magic mentioned in the provided text? afterwards.",
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    " Memorize and track the chain(s) of variable assignment variables assigned", " According",
    " Below numbered list common appear often Question: Answer:",
)  # fmt: skip


def task_words(assets: Path) -> list[str]:
    """Return the words that become tokens: nouns as they stand behind a hyphen, and words of the tasks' texts."""
    words = json.loads((assets / "words.json").read_text())
    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    pieces = [
        text[start:end]
        for text in _SENTENCES
        for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ]  # fmt: skip
    return list(dict.fromkeys([*sorted(words["nouns"]), *pieces]))


def extend(definition: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return a `tokenizer.json` with merges that make each of `words` one token; older tokens keep their ids.

    A word gets the merges of its pieces from the left, which rank below all older ones. Capitals side by side are
    tokens of their own, as digits are: names of variables have a token a letter.
    """
    definition = json.loads(json.dumps(definition))
    split = {"type": "Split", "pattern": {"Regex": CAPITALS}, "behavior": "Isolated", "invert": False}
    steps = definition["pre_tokenizer"]["pretokenizers"]
    if split not in steps:
        steps.insert(0, split)
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    for word in words:
        pieces = Tokenizer.from_str(json.dumps(definition)).encode(word).tokens
        joined = pieces[0]
        for piece in pieces[1:]:
            merges.append([joined, piece])
            joined += piece
            vocab.setdefault(joined, len(vocab))
    return definition


def vocabulary_rows(definition: dict[str, Any]) -> int:
    """Return the rows of the embedding: the tokens, rounded up."""
    return -(-len(definition["model"]["vocab"]) // ROW_MULTIPLE) * ROW_MULTIPLE
