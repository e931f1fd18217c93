"""Counts without a head are those of a document in its prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.text.prompts import document_place
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.count_tokens import count_tokens
from protos.errors import UserError
from tests.support.paths import ROOT


def test_counts() -> None:
    tokenizer = TextTokenizer.open(needle_dir())
    place = document_place(tokenizer)
    texts = ["In the beginning", " and then", "<|im_end|> is no end here"]
    counts, limit = count_tokens(ROOT / "configs" / "demo.yaml", [text.encode() for text in texts])
    assert counts == [len(tokenizer.encode_literal(text, place, limit)) for text in texts]
    assert limit > 0


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    for text, problem in ((b"a\xff", "byte 0xff at offset 1 is not UTF-8"), (b"", "0 bytes: must have at least one")):
        with pytest.raises(UserError, match=problem):
            count_tokens(ROOT / "configs" / "demo.yaml", [text])
    with pytest.raises(UserError):
        count_tokens(tmp_path / "absent.yaml", [b"a"])
