"""Budgets of reasoning in an engine over fake stages: forced tokens in plans, what runs ahead, resumed answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from cluster.constraints import compiler as compiler_module
from cluster.constraints.compiler import ConstraintCompiler
from cluster.constraints.thinking import closing_ids
from cluster.engine.engine import Engine
from cluster.engine.outputs import OutputToken
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.jobs.constraint import Constraint
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import Rig
from tests.support.paths import NEEDLE

TOKENIZER = TextTokenizer.open(NEEDLE)
END = 0
OPEN = TOKENIZER.encode("<think>\n", literal=True)
WORD = TOKENIZER.encode("so", literal=True, continues=True)[0]
SENTENCE = closing_ids(TOKENIZER, 1, (), True)


@pytest.fixture(params=[1, 2, 3])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(compiler_module, "try_grammar", lambda *_: None)
    made = Rig(lambda sequence, index: WORD, stages=request.param, text=True, eos=(END,))
    made.engine = Engine(
        made.engine.scheduler, made.shards, TOKENIZER, (END,), clock=made.clock,
        constraints=ConstraintCompiler(TOKENIZER, 4096, [END]),
    )  # fmt: skip
    with made:
        yield made


@pytest.mark.parametrize("budget", [0, 1, 2, 17, 67])
def test_a_model_that_never_ends_its_reasoning_is_made_to(rig: Rig, budget: int) -> None:
    closing = closing_ids(TOKENIZER, budget, OPEN, True)
    result, events = rig.run([5] * 20 + OPEN, budget + len(closing) + 30, thinking_budget=budget)
    assert list(result.token_ids) == [WORD] * budget + closing + [WORD] * 30
    assert result.text == TOKENIZER.decode([WORD] * 30)
    wanted = TOKENIZER.decode([WORD] * budget + closing).removesuffix("</think>").strip()
    assert result.reasoning == (wanted or None)
    tokens = [event for event in events if isinstance(event, OutputToken)]
    assert "".join(token.reasoning for token in tokens) == wanted
    assert "".join(token.answer for token in tokens) == result.text
    sampled = [part for plan in rig.last.plans for part in plan.slices if part.sample]
    forced = [part.sample.forced for part in sampled if part.sample]
    assert forced == [None] * budget + closing + [None] * 30
    blind = [at for at, part in enumerate(sampled) if not part.token_ids]
    assert all(at < budget or at > budget + len(closing) for at in blind), "neither forced ones nor the next"
    assert any(at > budget + len(closing) for at in blind)
    assert budget < 17 or any(at < budget for at in blind)


def test_a_model_that_ends_it_in_time_is_free(rig: Rig) -> None:
    said = [WORD, *TOKENIZER.encode("</think>", literal=True, continues=True), *[WORD] * 40]
    rig.last.script = lambda sequence, index: said[index]
    result, _ = rig.run([5] * 20 + OPEN, len(said), thinking_budget=20)
    assert list(result.token_ids) == said


def test_a_model_that_does_not_reason_is_free(rig: Rig) -> None:
    result, _ = rig.run([5] * 20, 40, thinking_budget=0)
    assert list(result.token_ids) == [WORD] * 40
    blind = [part for plan in rig.last.plans for part in plan.slices if not part.token_ids]
    assert blind, "nothing was run ahead"


def test_reasoning_that_the_model_opens_itself(rig: Rig) -> None:
    opening = TOKENIZER.encode("<think>", literal=True)
    rig.last.script = lambda sequence, index: opening[index] if index < len(opening) else WORD
    for budget in (0, 3):
        closing = closing_ids(TOKENIZER, budget, (), False)
        result, _ = rig.run([5] * 20, 80, thinking_budget=budget)
        assert list(result.token_ids)[: len(opening) + budget + len(closing)] == opening + [WORD] * budget + closing
        assert (result.reasoning is None) == (not budget)


def test_resumed_after_every_token(rig: Rig) -> None:
    """Over budgets, constraints behind the reasoning, and beginnings of many kinds, cut at any token."""
    draw = random.Random(rig.engine.scheduler._num_stages)
    pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
    for budget in (0, 1, 5):
        constraint = draw.choice([None, Constraint("choice", '["there", "then the"]')])
        values = {"structured_outputs": constraint, "thinking_budget": budget}
        prompt = [5] * draw.randrange(1, 70) + OPEN
        whole, _ = rig.run(prompt, 60, **values)
        assert constraint is None or whole.text in ("there", "then the")
        for cut in range(len(whole.samples) + 1):
            again, _ = rig.run(prompt, 60, resume=whole.samples[:cut], **values)
            assert (again.token_ids, again.text) == (whole.token_ids, whole.text)
            assert (again.reasoning, again.finish_reason) == (whole.reasoning, whole.finish_reason)


def test_a_constraint_begins_behind_it(rig: Rig) -> None:
    pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
    constraint = Constraint("choice", '["there"]')
    result, _ = rig.run([5] * 20 + OPEN, 90, structured_outputs=constraint, thinking_budget=7)
    assert (result.text, result.finish_reason) == ("there", FinishReason.STOP)
    assert list(result.token_ids[: 7 + len(SENTENCE)]) == [WORD] * 7 + SENTENCE


def test_max_tokens_may_end_it_first(rig: Rig) -> None:
    for most in (5, 20, 25):
        result, _ = rig.run([5] * 20 + OPEN, most, thinking_budget=20)
        assert (result.finish_reason, result.text) == (FinishReason.LENGTH, "")
        assert list(result.token_ids) == ([WORD] * 20 + SENTENCE)[:most]


def test_without_tokenizer() -> None:
    with Rig() as rig, pytest.raises(UserError, match="thinking_budget: needs the model's tokenizer"):
        rig.engine.submit_all([(generation_spec([5], 3, thinking_budget=1), lambda event: None)])
