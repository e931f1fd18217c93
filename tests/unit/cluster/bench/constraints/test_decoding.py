"""How masks and lost decoding ahead are told from what was measured in turns, and that no answer ends early."""

from __future__ import annotations

import pytest

from cluster.bench.constraints.decoding import ANSWERS, summarize
from cluster.constraints.answer import ConstrainedAnswer
from cluster.constraints.compiler import ConstraintCompiler
from protos.jobs.constraint import Constraint
from tests.support.rigs.http import needle_tokenizer


def rows(token: float, mask: list[float]) -> dict[str, list[float]]:
    return {"token_ms": [token, token + 5, token + 1], "token_cpu_ms": [0.5, 1.0, 1.5], "mask_ms": mask}


def test_a_constraint_adds_its_masks_and_the_rest() -> None:
    found = summarize({
        "unconstrained": rows(2.0, []), "any_text": rows(3.0, [0.1, 0.1, 0.4]), "regex": rows(4.5, [0.2, 0.2, 2.0]),
    })  # fmt: skip
    assert found == {
        "answers": {
            "unconstrained": {"token_ms": 3, "token_cpu_ms": 1},
            "any_text": {
                "token_ms": 4, "token_cpu_ms": 1, "mask_ms": 0.2, "mask_median_ms": 0.1, "over_ms": 1, "rest_ms": 0.8,
            },
            "regex": {
                "token_ms": 5.5, "token_cpu_ms": 1, "mask_ms": 0.8, "mask_median_ms": 0.2, "over_ms": 2.5,
                "rest_ms": 1.7,
            },
        },
        "lost_decode_ahead_ms": 0.8,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, constraint in ANSWERS.items() if constraint is not None])
def test_no_constraint_ends_an_answer(name: str) -> None:
    tokenizer = needle_tokenizer()
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, sorted(tokenizer.end_ids))
    answer = ConstrainedAnswer(compiler.begin(Constraint.from_value(ANSWERS[name])), (), False, None)
    for _ in range(300):
        assert not answer.is_complete
        at = next(index for index, byte in enumerate(answer.mask) if byte)
        answer.push(8 * at + (answer.mask[at] & -answer.mask[at]).bit_length() - 1, "answer", "")
