"""The constraint on one answer with reasoning before it, and when it is complete."""

import pytest

from cluster.constraints import compiler as compiler_module
from cluster.constraints.answer import ConstrainedAnswer, open_token
from cluster.constraints.compiler import ConstraintCompiler, ConstraintError
from cluster.text.detokenizer import OutputText
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.constraint import Constraint
from tests.support.paths import NEEDLE

pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
TOKENIZER = TextTokenizer.open(NEEDLE)
END = 0
OPEN = 7  # stands for the opening tag


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "try_grammar", lambda *_: None)


def answer(pattern: str, reasoning: bool = False, open_id: int | None = None) -> ConstrainedAnswer:
    matcher = ConstraintCompiler(TOKENIZER, 4096, [END]).begin(Constraint("regex", pattern))
    return ConstrainedAnswer(matcher, {END}, reasoning, open_id)


def allows(one: ConstrainedAnswer, token: int) -> bool:
    return bool(one.mask[token // 8] >> token % 8 & 1)


def push_text(one: ConstrainedAnswer, text: str, opened: bool = False) -> None:
    output = OutputText(TOKENIZER, (), opened, {END})
    for token in TOKENIZER.encode(text, literal=True):
        _, _, added = output.push(token)
        one.push(token, output.part, added)


def test_complete_when_nothing_but_the_end_can_follow() -> None:
    one = answer("the(re)?")
    push_text(one, "the")
    assert not one.is_complete
    assert allows(one, END)
    push_text(one, "re")
    assert one.is_complete


def test_end_token_is_taken() -> None:
    one = answer("a*")
    one.push(END, "answer", "")
    assert not one.is_complete


def test_reasoning_is_free() -> None:
    one = answer("yes", reasoning=True)
    assert one.mask == b""
    push_text(one, "anything </think>", opened=True)
    assert one.mask != b""
    assert not one.is_complete
    push_text(one, "yes")
    assert one.is_complete


def test_answer_in_the_token_that_ends_the_reasoning() -> None:
    one = answer("yes", reasoning=True)
    one.push(5, "answer", "ye")
    push_text(one, "s")
    assert one.is_complete
    with pytest.raises(ConstraintError):
        answer("yes", reasoning=True).push(5, "answer", "no")


def test_reasoning_that_the_model_opens_itself() -> None:
    one = answer("yes", open_id=OPEN)
    assert allows(one, OPEN)
    one.push(OPEN, "reasoning", "")
    assert one.mask == b""
    one.push(5, "answer", "")
    assert not allows(one, OPEN), "once only"
    one = answer("yes", open_id=OPEN)
    push_text(one, "ye")
    assert not allows(one, OPEN)


@pytest.mark.parametrize(
    ("template", "thinking", "opens"),
    [
        ("enable_thinking", None, True), ("enable_thinking", False, False), ("plain", None, False),
        ("plain", True, True), (None, None, False),
    ],
)  # fmt: skip
def test_who_may_think(template: str | None, thinking: bool | None, opens: bool) -> None:
    class Hybrid:
        chat_template = template

        def added_id(self, text: str) -> int:
            assert text == "<think>"
            return OPEN

    assert open_token(Hybrid(), thinking) == (OPEN if opens else None)  # type: ignore[arg-type]
    assert open_token(TOKENIZER, True) is None, "it has no such token"
