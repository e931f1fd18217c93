"""The tokenizer that we read out of a GGUF file gives the ids of transformers' and of llama.cpp's."""

from __future__ import annotations

import pytest
from tokenizers import normalizers
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import PreTrainedTokenizerBase

from cluster.text.tokenizer import TextTokenizer
from tests.support.real.llama_cpp import LlamaServer
from tests.support.real.models import MODELS
from tests.support.real.texts import awkward_strings, is_nfc

STRINGS = awkward_strings(400)


@pytest.fixture(scope="module")
def reference(name: str, theirs: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer, with what the model's own tokenizer.json has and GGUF does not spell out."""
    inner = theirs.backend_tokenizer
    if MODELS[name].nfc:
        inner.normalizer = normalizers.NFC()
    if MODELS[name].digits:
        inner.pre_tokenizer = Sequence([Digits(individual_digits=True), inner.pre_tokenizer])
    return theirs


def test_ids_are_those_of_transformers(ours: TextTokenizer, reference: PreTrainedTokenizerBase) -> None:
    other = {
        text: (got, expected)
        for text in STRINGS
        if (got := ours.encode(text)) != (expected := reference.encode(text, add_special_tokens=False))
    }
    assert other == {}


def test_ids_are_those_of_llama_cpp(name: str, ours: TextTokenizer, llama: LlamaServer) -> None:
    texts = [text for text in STRINGS if is_nfc(text) or not MODELS[name].nfc]
    other = {
        text: (got, expected) for text in texts if (got := ours.encode(text)) != (expected := llama.tokenize(text))
    }
    assert other == {}


def test_text_of_ids_is_that_of_transformers(ours: TextTokenizer, reference: PreTrainedTokenizerBase) -> None:
    for text in STRINGS:
        ids = ours.encode(text)
        expected = reference.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=False) == expected
