"""What samples are made of."""

from __future__ import annotations

import random
from pathlib import Path

from cluster.tools.eval.ruler.sample import Material, read_material


def test_listed_words_are_different_and_begin_with_the_common_ones(material: Material) -> None:
    assert len(set(material.listed)) == len(material.listed) > 5000
    assert set(material.listed[: material.common]) == {*material.adjectives, *material.nouns}
    assert all(word.isalpha() and word.islower() for word in material.listed)


def test_passages_have_the_words_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("One two. Three four?\nFive: six seven.\n")
    material = read_material(tmp_path / "x.txt")
    for seed in range(20):
        sentences = material.passage(20, random.Random(seed))  # more than the text has
        words = " ".join(sentences).split()
        assert len(words) == 20
        assert words[7:14] == words[:7]
        assert all(sentence[-1] in ".?:" for sentence in sentences[:-1])
    starts = {material.passage(1, random.Random(seed))[0] for seed in range(60)}
    assert starts == {"One", "two.", "Three", "four?", "Five:", "six", "seven."}
    assert material.passage(0, random.Random(0)) == []


def test_keys_are_an_adjective_and_a_noun(material: Material) -> None:
    adjective, _, noun = material.draw_key(random.Random(1)).partition("-")
    assert adjective in material.adjectives
    assert noun in material.nouns
