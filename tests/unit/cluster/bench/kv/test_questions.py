"""What a question's figures are made of."""

from __future__ import annotations

import pytest

from cluster.bench.kv.questions import question_row
from cluster.bench.kv.rig import Asked
from cluster.client.models import Answer, Progress
from cluster.tools.eval.haystack import Needle

NEEDLE = Needle("old", "stone", "12345", "What?", " The secret code of old stone is 12345.", 0.5)


def asked(cached: int, text: str = "The secret code of old stone is 12345.") -> Asked:
    answer = Answer("What?", text, None, "stop", (1, 2), 10_000, cached, Progress())
    return Asked(0.25, 1.0, [(0.1, 6000), (0.2, 10_000)], [0.25, 0.5], answer)


def test_found_tokens_come_from_the_store_or_from_memory() -> None:
    counts = {"loaded blocks": 18.0, "loaded bytes": 50e6, "loaded seconds": 0.1}
    row = question_row(asked(9000), counts, NEEDLE)
    assert (row["from_store_tokens"], row["from_memory_tokens"], row["computed_tokens"]) == (9000, 0, 1000)
    assert (row["loaded_mb"], row["load_mb_per_s"]) == (50, 500)
    row = question_row(asked(9000), {"loaded blocks": 1.0}, NEEDLE)
    assert (row["from_store_tokens"], row["from_memory_tokens"], row["load_mb_per_s"]) == (2048, 6952, None)
    assert question_row(asked(0), {}, NEEDLE)["computed_tokens"] == 10_000


@pytest.mark.parametrize(("text", "is_right"), [("The secret code of old stone is 12345.", True), ("12345", False)])
def test_answers_are_compared_with_the_truth(text: str, is_right: bool) -> None:
    assert question_row(asked(0, text), {}, NEEDLE)["right"] is is_right


def test_when_so_much_of_a_prompt_was_done() -> None:
    assert [asked(0).reached(tokens) for tokens in (1, 6000, 6001, 20_000)] == [0.1, 0.1, 0.2, 0.25]
