"""Lists and coded texts: how often words stand in them."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from cluster.tools.eval.ruler.sample import Material
from cluster.tools.eval.ruler.word_counts import COMMON, common_words, frequent_words


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4095, 6, 1), (4096, 30, 3), (131072, 30, 3)])
def test_ten_words_are_common(material: Material, length: int, often: int, seldom: int) -> None:
    for seed, size in enumerate((COMMON + 1, 57, 255, 256, 1000)):
        (made,) = common_words(material, length).make(size, random.Random(seed))
        example, _, main = made.input.partition(" Answer: The top 10 words that appear most often in the list are:")
        numbered = re.findall(r"(\d+)\. (\w+)", main.partition("Memorize the ones")[2])
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        assert {word for word, times in counts.items() if times == often} == set(made.outputs)
        assert sorted(counts.values()) == [seldom] * (size - COMMON) + [often] * COMMON
        shown = Counter(re.findall(r"\d+\. (\w+)", example))
        answered = re.findall(r"\d+\. (\w+)", main.partition("\n")[0])
        assert {word for word, _ in shown.most_common(COMMON)} == set(answered)
        assert len(set(made.outputs)) == COMMON


def test_lists_longer_than_all_words_get_coded_ones(material: Material) -> None:
    size = len(material.listed) + 500
    (made,) = common_words(material, 1 << 20).make(size, random.Random(0))
    words = set(re.findall(r"\d+\. (\w+)", made.input.rpartition("Memorize the ones")[2]))
    assert len(words) == size


@pytest.mark.parametrize(("length", "size"), [(512, 30), (4096, 500), (65536, 20_000)])
def test_coded_words_follow_zetas_distribution(length: int, size: int) -> None:
    (made,) = frequent_words(length).make(size, random.Random(5))
    text = made.input.partition("coded words. ")[2].partition("\n")[0].split(" ")
    (dots, most), *rest = Counter(text).most_common()
    assert dots == "..."
    zeta = sum(rank**-2 for rank in range(1, 100_000))
    assert most == int(size / zeta)
    assert tuple(word for word, _ in rest[:3]) == made.outputs
    times = [times for _, times in rest]
    expected = [int(size * rank**-2 / zeta) for rank in range(2, max(10, length // 50) + 1)]
    assert times == pytest.approx([count for count in expected if count], abs=1)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)
