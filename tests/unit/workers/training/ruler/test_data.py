"""Documents out of samples: exact lengths, what is scored, follow-up questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.unit.workers.training.ruler.conftest import needles
from workers.training.data import Document
from workers.training.ruler.data import FIRST_WEIGHT, DocumentMaker, Sample, find_example, read_samples

CWE = Sample(
    "cwe",
    "List: 1. a 2. a 3. b Answer: The top 10 words are: 1. river 2. apple\nList: 1. calm 2. calm 3. brave",
    " Answer: The top 10 words are:",
    ("calm", "brave"),
)
VT = Sample(
    "vt",
    "VAR ABC = 11111\nAnswer: In the text, 5 have the value 11111, they are:  ABC DEF\n\n\n\nVAR QWERT = 22222",
    "Answer: In the text, 5 have the value 22222, they are: ",
    ("QWERT",),
)


def maker(tokenizer: Tokenizer, seed: int = 0) -> DocumentMaker:
    return DocumentMaker(tokenizer, np.random.default_rng(seed))


def scored(tokenizer: Tokenizer, document: Document) -> str:
    """The scored tokens as text, runs of them parted by a bar."""
    parts, last = "", -1
    for at in sorted(document.answers):
        parts += "|" if at != last + 1 and last >= 0 else ""
        parts += tokenizer.decode([document.tokens[at]], skip_special_tokens=False)
        last = at
    return parts


def firsts(tokenizer: Tokenizer, document: Document) -> list[str]:
    weights = {at: weight for at, (weight, _) in document.answers.items()}
    return [tokenizer.decode([document.tokens[at]]).strip() for at in sorted(weights) if weights[at] == FIRST_WEIGHT]


def test_answers_and_follow_ups_are_scored(tokenizer: Tokenizer) -> None:
    entry = needles(4, random.Random(0))
    sample = Sample("niah_multikey_2", entry["input"], entry["answer_prefix"], tuple(entry["outputs"]))  # type: ignore[arg-type]
    document = maker(tokenizer).make(sample, 400)
    assert document is not None
    assert len(document.tokens) == 400
    text = tokenizer.decode(document.tokens, skip_special_tokens=False)
    assert text.startswith(f"{sample.input}{sample.answer_prefix} {sample.outputs[0]}.<|endoftext|>\nWhat is the")
    assert text.endswith("<|endoftext|><|endoftext|>")
    answers = scored(tokenizer, document).split("|")
    answers = [part for part in "|".join(answers).split("<|endoftext") if part.strip("|>")]
    values = [part.strip("|> .") for part in answers]
    assert values[0] == sample.outputs[0]
    assert len(values) == 5  # the question, and all four again
    assert all(value in sample.input for value in values)
    assert firsts(tokenizer, document) == [value[0] for value in values]
    assert sum(first for _, first in document.answers.values()) == 5


def test_follow_ups_stop_where_there_is_no_room(tokenizer: Tokenizer) -> None:
    entry = needles(4, random.Random(1))
    sample = Sample("niah_multikey_2", entry["input"], entry["answer_prefix"], tuple(entry["outputs"]))  # type: ignore[arg-type]
    alone = len(tokenizer.encode(sample.input + sample.answer_prefix).ids) + 10  # " 1234567." and the end
    document = maker(tokenizer).make(sample, alone)
    assert document is not None
    assert len(document.answers) == 10
    assert document.tokens[-1] == 0
    assert maker(tokenizer).make(sample, alone - 1) is None


def test_several_outputs_are_in_the_order_of_the_text(tokenizer: Tokenizer) -> None:
    sample = Sample("niah_multivalue", "x 222 y 111 z 333", " are", ("111", "222", "333"))
    assert sample.in_order == ("222", "111", "333")
    document = maker(tokenizer).make(sample, 64)
    assert document is not None
    assert scored(tokenizer, document).startswith(" 222, 111, 333.<|endoftext|>")
    assert Sample("niah_multiquery", sample.input, "", sample.outputs).in_order == sample.outputs


def test_the_answer_of_an_example_is_scored_too(tokenizer: Tokenizer) -> None:
    document = maker(tokenizer).make(VT, 128)
    assert document is not None
    assert scored(tokenizer, document).replace(" ", "") == "ABCDEF|QWERT.<|endoftext|>"
    assert sum(first for _, first in document.answers.values()) == 3


def test_words_without_order_are_not_counted(tokenizer: Tokenizer) -> None:
    orders = set()
    for seed in range(8):
        document = maker(tokenizer, seed).make(CWE, 128)
        assert document is not None
        orders.add(scored(tokenizer, document))
        assert not any(first for _, first in document.answers.values())
    ends = {order.rpartition("|")[2] for order in orders}
    assert ends == {" 1. calm 2. brave.<|endoftext|>", " 1. brave 2. calm.<|endoftext|>"} or len(orders) == 2


def test_where_examples_are() -> None:
    begin, end, outputs = find_example(CWE)
    assert CWE.input[begin:end] == " 1. river 2. apple"
    assert outputs == ("river", "apple")
    begin, end, outputs = find_example(VT)
    assert VT.input[begin:end] == "  ABC DEF"
    assert outputs == ("ABC", "DEF")
    assert find_example(Sample("niah_single_1", "text", " The number is", ("1",))) == (0, 0, ())


def test_samples_are_read_by_length(samples: Path, tmp_path: Path) -> None:
    found = read_samples(samples)
    assert {length: len(each) for length, each in found.items()} == {192: 40, 320: 40}
    with pytest.raises(ValueError, match=r"--data: .* has no LENGTH/TASK/\*.jsonl"):
        read_samples(tmp_path)
    bad = tmp_path / "64" / "vt" / "x.jsonl"
    bad.parent.mkdir(parents=True)
    bad.write_text(json.dumps({"input": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: not a sample"):
        read_samples(tmp_path)
