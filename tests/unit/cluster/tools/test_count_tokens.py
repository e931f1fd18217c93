"""Counts without a head are those of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.count_tokens import count_tokens
from protos.errors import UserError
from tests.support.paths import ROOT


def test_counts() -> None:
    tokenizer = TextTokenizer.open(needle_dir())
    texts = ["In the beginning", "", "<|im_end|> is no end here"]
    counts, limit = count_tokens(ROOT / "configs" / "demo.yaml", [text.encode() for text in texts])
    assert counts == [len(tokenizer.encode(text, literal=True)) for text in texts]
    assert limit > 0


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="byte 0xff is not UTF-8"):
        count_tokens(ROOT / "configs" / "demo.yaml", [b"a\xff"])
    with pytest.raises(UserError):
        count_tokens(tmp_path / "absent.yaml", [b"a"])
