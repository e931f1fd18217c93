"""Constrained answers in an engine over fake stages: masks in plans, no running ahead, ends, resumed answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from cluster.common.errors import EngineError
from cluster.constraints import compiler as compiler_module
from cluster.constraints.compiler import ConstraintCompiler, ConstraintError, Matcher
from cluster.engine.engine import Engine
from cluster.engine.outputs import OutputToken
from cluster.engine.request_handle import RequestFactory
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from protos.errors import InvalidRequest, UserError
from protos.jobs.constraint import Constraint
from protos.stage.messages import SampledToken, SequenceSlice
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import WAIT, Rig
from tests.support.paths import NEEDLE

pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
TOKENIZER = TextTokenizer.open(NEEDLE)
END = 0
VOCAB = 4096
WORDS = Constraint("regex", "(the|there|then){2,4}x?")


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "try_grammar", lambda *_: None)


@pytest.fixture(params=[1, 2, 3])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(stages=request.param, text=True, eos=(END,))
    made.engine = Engine(
        made.engine.scheduler, made.shards, TOKENIZER, (END,), clock=made.clock,
        constraints=ConstraintCompiler(TOKENIZER, VOCAB, [END]),
    )  # fmt: skip
    with made:
        yield made


def matches(text: str) -> bool:
    import regex

    return regex.fullmatch(WORDS.text, text) is not None


def test_answer_matches(rig: Rig) -> None:
    result, events = rig.run([5] * 40, 60, structured_outputs=WORDS)
    assert result.finish_reason is FinishReason.STOP
    assert matches(result.text)
    assert "".join(event.text for event in events if isinstance(event, OutputToken)) == result.text


def test_every_plan_has_the_mask_of_its_token(rig: Rig) -> None:
    result, _ = rig.run([5] * 40, 60, structured_outputs=WORDS)
    matcher = ConstraintCompiler(TOKENIZER, VOCAB, [END]).begin(WORDS)
    sampled = [part for plan in rig.last.plans for part in plan.slices if part.sample]
    assert [part.sample.token_index for part in sampled if part.sample] == list(range(len(result.token_ids)))
    for part, token in zip(sampled, result.token_ids, strict=True):
        assert part.sample is not None
        assert part.sample.mask == bytes(matcher.mask([END]))
        if token != END:
            matcher.accept(token)
    ids = [list(part.token_ids) for part in sampled[1:]]
    assert ids == [[token] for token in result.token_ids[:-1]], "none was run ahead"


def test_others_of_the_batch_run_ahead(rig: Rig) -> None:
    handles = [
        rig.submit([5] * 20, 40, structured_outputs=WORDS)[0], rig.submit([6] * 20, 40)[0],
        rig.submit([7] * 20, 40, structured_outputs=Constraint("choice", '["there"]'))[0],
    ]  # fmt: skip
    first, free, choice = (handle.wait(WAIT) for handle in handles)
    assert matches(first.text)
    assert choice.text == "there"
    assert list(free.token_ids) == [1000 + index for index in range(40)]
    by_sequence: dict[int, list[SequenceSlice]] = {}
    for plan in rig.last.plans:
        for part in plan.slices:
            by_sequence.setdefault(part.sequence, []).append(part)
    masks = [{bool(part.sample.mask) for part in parts if part.sample} for parts in by_sequence.values()]
    assert masks == [{True}, {False}, {True}]
    assert any(not part.token_ids for part in list(by_sequence.values())[1]), "the free one did not run ahead"


def test_end_token_is_left_out_when_nothing_else_can_follow(rig: Rig) -> None:
    result, _ = rig.run([5] * 20, 40, structured_outputs=Constraint("choice", '["then the"]'))
    assert result.finish_reason is FinishReason.STOP
    assert (result.text, END in result.token_ids) == ("then the", False)


def test_ignored_end_token(rig: Rig) -> None:
    result, _ = rig.run([5] * 20, 9, structured_outputs=Constraint("regex", "a*"), ignore_eos=True)
    assert (result.finish_reason, set(result.text)) == (FinishReason.LENGTH, {"a"})
    assert len(result.token_ids) == 9


def test_max_tokens_cuts_an_answer_short(rig: Rig) -> None:
    result, _ = rig.run([5] * 20, 2, structured_outputs=Constraint("choice", '["then the then the then"]'))
    assert result.finish_reason is FinishReason.LENGTH
    assert "then the then the then".startswith(result.text)


def test_stop_string_ends_it_first(rig: Rig) -> None:
    result, _ = rig.run([5] * 20, 40, structured_outputs=Constraint("choice", '["then the"]'), stop=("the",))
    assert (result.finish_reason, result.text) == (FinishReason.STOP, "")


def test_stop_id_is_let_through_at_the_end(rig: Rig) -> None:
    constraint = Constraint("regex", "(the)+")
    result, _ = rig.run([5] * 20, 90, structured_outputs=constraint, stop_token_ids=(2,), ignore_eos=True)
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids[-1] == 2
    assert set(result.text.split("the")) == {""}


def test_resumed_after_every_token(rig: Rig) -> None:
    whole, _ = rig.run([5] * 20, 60, structured_outputs=WORDS)
    for cut in range(len(whole.samples) + 1):
        again, _ = rig.run([5] * 20, 60, structured_outputs=WORDS, resume=whole.samples[:cut])
        assert (again.token_ids, again.text, again.finish_reason) == (whole.token_ids, whole.text, FinishReason.STOP)


def test_error_of_a_constraint_ends_its_answer_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    other, _ = rig.submit([6] * 20, 30)
    calls, mask = itertools.count(), Matcher.mask

    def fails_later(self: Matcher, end_ids):
        if next(calls) == 2:
            raise ConstraintError("step limit")
        return mask(self, end_ids)

    monkeypatch.setattr(Matcher, "mask", fails_later)
    handle, _ = rig.submit([5] * 20, 60, structured_outputs=WORDS)
    with pytest.raises(EngineError, match="step limit"):
        handle.wait(WAIT)
    assert len(other.wait(WAIT).token_ids) == 30


def test_refused_before_it_is_queued(rig: Rig) -> None:
    with pytest.raises(InvalidRequest, match="look-around"):
        rig.submit([5] * 20, 5, structured_outputs=Constraint("regex", "a(?=b)"))
    with pytest.raises(UserError, match="the answer cannot go on"):
        rig.submit([5] * 20, 5, structured_outputs=WORDS, resume=(SampledToken(1, 9),))


def test_without_tokenizer() -> None:
    spec = generation_spec([5], 3, structured_outputs=WORDS)
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        RequestFactory(None, frozenset()).open(1, spec, lambda event: None, 0.0, itertools.count())


def test_reasoning_is_not_masked(rig: Rig) -> None:
    """The prompt opens `<think>`; tokens are free until the text `</think>`, of several tokens."""
    closing = TOKENIZER.encode("so </think>", literal=True)
    rig.last.script = lambda sequence, index: closing[index] if index < len(closing) else END
    prompt = [5] * 20 + TOKENIZER.encode("<think>\n", literal=True)
    result, _ = rig.run(prompt, 60, structured_outputs=Constraint("choice", '["there"]'))
    assert (result.reasoning, result.text, result.finish_reason) == ("so", "there", FinishReason.STOP)
    masks = [part.sample.mask for plan in rig.last.plans for part in plan.slices if part.sample]
    assert [bool(mask) for mask in masks] == [False] * len(closing) + [True] * (len(masks) - len(closing))
