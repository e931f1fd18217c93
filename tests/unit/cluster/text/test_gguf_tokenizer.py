"""The tokenizer of a GGUF file is the one that it was made from; what would give other tokens is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from cluster.text.gguf_tokenizer import read_tokenizer, tokenizer_file
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from protos.model.gguf.file import GgufError
from tests.support.data.tokenizer_families import LLAMA3_SPLIT, byte_level
from tests.support.gguf_files import tokenizer_settings, write_settings
from tests.support.paths import ROOT

TEXTS = [
    "", "a", " ab  ab\tab", "I'LL don't we've", "12345 3.14 ٣४ ½²Ⅷ", "\n\n\r\n x \n", "世界你好，今天", "é vs e\u0301",
    "👩‍👩‍👧‍👦🦙🏽", "a<|im_end|>b<|im_start|>user\nhi<|endoftext|>", "<tool> <tool></tool>", "\u200b\ufeff\u00a0", " ",
    "<|im_end|", "x" * 300, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def original(pre: str, inside: bool = False) -> Tokenizer:
    """A tokenizer as models have it; `inside`: its special tokens are entries of the model's vocabulary."""
    made = {
        "qwen2": lambda: byte_level(normalizer=normalizers.NFC()),
        "llama-bpe": lambda: byte_level(LLAMA3_SPLIT),
        "gpt-2": lambda: byte_level(None),
        "smollm": lambda: byte_level(None),
    }[pre]()
    layout = json.loads(made.to_str())
    vocab, merges = layout["model"]["vocab"], [tuple(pair) for pair in layout["model"]["merges"]]
    if inside:
        vocab = {token: i for i, token in enumerate([*SPECIAL, *vocab])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.normalizer, tokenizer.decoder = made.normalizer, made.decoder
    tokenizer.pre_tokenizer = made.pre_tokenizer
    if pre == "smollm":
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte])
    plain = [AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens(plain)
    return tokenizer


def both(tmp_path: Path, pre: str, inside: bool = False, **more: Any) -> tuple[TextTokenizer, TextTokenizer]:
    tokenizer = original(pre, inside)
    names = {"eos_token": SPECIAL[2], "bos_token": SPECIAL[0]}
    ids = {f"{name.removesuffix('_token')}_token_id": tokenizer.token_to_id(text) for name, text in names.items()}
    path = write_settings(tmp_path / "m.gguf", tokenizer_settings(tokenizer, pre, **ids, **more))
    if more.get("add_bos_token", pre == "llama-bpe"):
        bos = [(SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=bos)
    return TextTokenizer.open(path), TextTokenizer(tokenizer.to_str().encode(), names, None)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("pre", ["qwen2", "smollm", "llama-bpe", "gpt-2"])
def test_ids_are_those_of_the_original(tmp_path: Path, pre: str, inside: bool) -> None:
    ours, theirs = both(tmp_path, pre, inside)
    for text in TEXTS:
        for options in ({}, {"literal": True}, {"add_special": True}):
            ids = ours.encode(text, **options)
            assert ids == theirs.encode(text, **options), (text, options)
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special=False)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.special_tokens == theirs.special_tokens
    assert (ours.end_ids, ours.added_texts) == (theirs.end_ids, theirs.added_texts)
    assert ours.vocabulary() == theirs.vocabulary()
    assert ours.longest_token_bytes == theirs.longest_token_bytes


@pytest.mark.parametrize(("pre", "asked", "expected"), [
    ("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False),
])  # fmt: skip
def test_the_first_token_is_put_where_the_file_says(
    tmp_path: Path, pre: str, asked: bool | None, expected: bool
) -> None:
    ours, theirs = both(tmp_path, pre, **({} if asked is None else {"add_bos_token": asked}))
    ids = ours.encode("ab", add_special=True)
    assert ids == theirs.encode("ab", add_special=True)
    assert (ours.id_to_token(ids[0]) == SPECIAL[0]) is expected


def test_ids_that_nothing_uses_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = original("qwen2")
    settings = tokenizer_settings(tokenizer, "qwen2")
    settings["tokenizer.ggml.tokens"] += ["[PAD1]", "<|later|>", "[PAD2]"]
    settings["tokenizer.ggml.token_type"] += [5, 3, 5]
    ours = TextTokenizer.open(write_settings(tmp_path / "m.gguf", settings))
    size = tokenizer.get_vocab_size()
    assert ours.encode("a<|later|>[PAD1]")[1] == ours.added_id("<|later|>") == size + 1
    assert ours.id_to_token(size) is None
    assert ours.encode("[PAD1]") == tokenizer.encode("[PAD1]").ids


def test_chat_templates(tmp_path: Path) -> None:
    settings = tokenizer_settings(original("qwen2"), "qwen2")
    key = "tokenizer.chat_template"
    named = settings | {key: "plain", f"{key}.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]}
    path = write_settings(tmp_path / "m.gguf", named)
    (tmp_path / "own.jinja").write_text("own", encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("of another model", encoding="utf-8")
    found = [TextTokenizer.open(path, name).chat_template for name in (None, "default", "tool_use", "own.jinja")]
    assert found == ["plain", "plain", "tools", "own"]
    assert TextTokenizer.open(write_settings(tmp_path / "none.gguf", settings)).chat_template is None
    with pytest.raises(TokenizerError, match=r"model\.chat_template: rag: .*m\.gguf has default, tool_use"):
        TextTokenizer.open(path, "rag")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model: llama: only gpt2 .byte-level BPE. is read"),
        ({"pre": "default"}, r"tokenizer\.ggml\.pre: default: must be one of qwen2, smollm, llama-bpe, gpt-2"),
        ({"token_type": [1, 2]}, r"tokenizer\.ggml\.token_type: must be a list of \d+ numbers"),
        ({"merges": ["a b", "a zz"]}, r"tokenizer\.ggml\.merges: 'a zz': must be two tokens that make a third"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens: must be a list of texts"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_settings(tmp_path / "m.gguf", tokenizer_settings(original("qwen2"), **{"pre": "qwen2"} | change))
    with pytest.raises(GgufError, match=words):
        read_tokenizer(path)
    with pytest.raises(TokenizerError, match=words):
        TextTokenizer.open(path)


def test_where_a_tokenizer_is(tmp_path: Path) -> None:
    assert tokenizer_file(tmp_path) == (tmp_path / "tokenizer.json", False)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert tokenizer_file(tmp_path) == (tmp_path / "tokenizer.json", True)
    with_one = write_settings(tmp_path / "a.gguf", tokenizer_settings(original("gpt-2"), "gpt-2"))
    without = write_settings(tmp_path / "b.gguf", {})
    assert tokenizer_file(with_one) == (with_one, True)
    assert tokenizer_file(without) == (without, False)
    with pytest.raises(GgufError, match=r"tokenizer\.ggml\.model: missing"):
        read_tokenizer(without)
