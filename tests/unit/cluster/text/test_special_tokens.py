"""Tokens that only the files beside `tokenizer.json` declare: the ids are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.text.tokenizer import TextTokenizer, TokenizerError
from tests.support.data.tokenizers import sentencepiece_like, with_bos

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXTS = ("ab <x> <y> b<z>", "a <s> <eos><x>b", "ab", "a  <y>\n<x>  <x>")
ORDINARY: dict[str, Any] = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def token(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "special": True, **ORDINARY, **flags}


def write(folder: Path, definition: str, **files: Any) -> Path:
    """Write a tokenizer's files; of `files`, config is tokenizer_config.json."""
    names = {"config": "tokenizer_config", "map": "special_tokens_map", "added": "added_tokens", "model": "config"}
    (folder / "tokenizer.json").write_text(definition)
    for key, value in files.items():
        (folder / f"{names[key]}.json").write_text(json.dumps(value))
    return folder


LAYOUTS: dict[str, dict[str, Any]] = {
    "nothing": {"config": FAST},
    "decoder": {"config": {**FAST, "added_tokens_decoder": {"267": token("<x>"), "268": token("<y>", special=False)}}},
    "other flags": {"config": {**FAST, "added_tokens_decoder": {"1": token("<s>", lstrip=True), "264": token("ab")}}},
    "a named one of the decoder": {
        "config": {**FAST, "eos_token": "<y>", "added_tokens_decoder": {"267": token("<y>", special=False)}}
    },
    "map": {"config": FAST, "map": {"eos_token": token("<eos>"), "additional_special_tokens": ["<x>", "<y>"]}},
    "map, no configuration": {
        "map": {"eos_token": "<x>", "sep_token": "<y>"}, "model": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "map beside a decoder": {"config": {**FAST, "added_tokens_decoder": {}}, "map": {"eos_token": "<x>"}},
    "extra": {"config": {**FAST, "extra_special_tokens": ["<x>", "<y>"], "eos_token": "<z>"}},
    "extra by name": {"config": {**FAST, "extra_special_tokens": {"image_token": "<x>", "b_token": "<y>"}}},
    "additional": {"config": {**FAST, "additional_special_tokens": ["<y>", "<x>"]}},
    "sep, cls, mask": {"config": {**FAST, "mask_token": "<x>", "cls_token": "<y>", "sep_token": "<z>"}},
    "a name of its own": {"config": {**FAST, "image_token": "<x>", "eos_token": "<y>"}},
    "added_tokens.json": {"config": {**FAST, "eos_token": "<y>"}, "added": {"<x>": 267, "<y>": 268}},
    "an object": {"config": {**FAST, "eos_token": {"__type": "AddedToken", **token("<x>", lstrip=True)}}},
    "flags of bos and eos": {"config": {**FAST, "bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}},
    "flags of legacy and prefix": {"config": {**FAST, "legacy": False, "add_prefix_space": False}},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bos", [False, True])
def test_ids_equal_those_of_transformers(tmp_path: Path, name: str, bos: bool) -> None:
    tokenizer = with_bos(sentencepiece_like()) if bos else sentencepiece_like()
    folder = write(tmp_path, tokenizer.to_str(), **LAYOUTS[name])
    reference, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer.open(folder)
    for text in TEXTS:
        assert ours.encode(text, add_special=True) == reference(text).input_ids or text.startswith("<s>")
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.special_tokens == {key: str(value) for key, value in reference.special_tokens_map.items()}
    assert ours.end_ids == ({reference.eos_token_id} if reference.eos_token is not None else set())


@pytest.mark.parametrize(
    "files", [{"config": {"added_tokens_decoder": {"300": token("<x>")}}}, {"added": {"<x>": 300}}]
)
def test_an_id_that_the_vocabulary_cannot_give_is_refused_by_name(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = write(tmp_path, sentencepiece_like().to_str(), **files)
    with pytest.raises(TokenizerError, match=r"added token '<x>': gets the id 267: must be 300, .* files agree\Z"):
        TextTokenizer.open(folder)


@pytest.mark.parametrize(
    "config",
    [{"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"267": {"special": True}}},
     {"added_tokens_decoder": [1]}, {"extra_special_tokens": 5}],
)  # fmt: skip
def test_unusable_declarations_are_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"\A[^\n]*tokenizer\.json: [^\n]+\Z"):
        TextTokenizer.open(write(tmp_path, sentencepiece_like().to_str(), config=config))
