"""The tokenizer of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from workers.training.needle import ASSETS
from workers.training.ruler.vocabulary import extend, task_words, vocabulary_rows

OLD = json.loads((ASSETS / "tokenizer.json").read_text())


def test_words_become_single_tokens_and_old_ids_stay() -> None:
    words = ["bridge", "brook", "bird", " provided", "apple", "tower"]
    new = extend(OLD, words)
    assert json.loads((ASSETS / "tokenizer.json").read_text()) == OLD
    assert {token: new["model"]["vocab"][token] for token in OLD["model"]["vocab"]} == OLD["model"]["vocab"]
    ids = sorted(new["model"]["vocab"].values())
    assert ids == list(range(len(ids)))
    tokenizer = Tokenizer.from_str(json.dumps(new))
    for word in words:
        (token,) = tokenizer.encode(word).ids
        assert tokenizer.decode([token]) == word
    text = "In the beginning God created the heaven and the earth. 12"
    assert tokenizer.encode(text).ids == Tokenizer.from_str(json.dumps(OLD)).encode(text).ids


def test_names_of_variables_have_a_token_a_letter() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(extend(OLD, ["apple"])))
    for name in ("LORDS", "ABCDE", "THEGO"):
        assert tokenizer.encode(f"VAR {name} = VAR QWERT").tokens[:9] == ["V", "A", "R", "Ġ", *name]
    assert tokenizer.encode("And The men").ids == Tokenizer.from_str(json.dumps(OLD)).encode("And The men").ids


def test_extending_again_changes_nothing() -> None:
    once = extend(OLD, ["apple", "bridge"])
    assert extend(once, ["apple", "bridge"]) == once


def test_rows_are_rounded_up() -> None:
    assert vocabulary_rows(OLD) == 4096
    assert vocabulary_rows(extend(OLD, ["apple"])) == 4160


def test_the_words_of_the_tasks(assets: Path) -> None:
    words = task_words(assets)
    assert words[:3] == ["apple", "river", "tower"]
    assert {" special", " magic", " mentioned", " provided"} <= set(words)
    assert len(set(words)) == len(words)
