"""Tokens as the job verbs print them."""

from __future__ import annotations

import pytest

from cluster.cli.output import TokenPrinter
from cluster.client.models import Token, TokenEvent


def test_token_printer(capsys: pytest.CaptureFixture[str]) -> None:
    def event(question: int, text: str) -> TokenEvent:
        return TokenEvent(question, Token(1, text), 1)

    printer = TokenPrinter(2)
    for question, text in ((0, "a"), (1, "b\n\nc"), (0, "d\n"), (0, "e")):
        printer.push(event(question, text))
    printer.finish()
    assert capsys.readouterr().out == "[2] b\n[2] \n[1] ad\n[1] e\n[2] c\n"
    printer = TokenPrinter(1)
    printer.push(event(0, "a"))
    printer.finish()
    printer.finish()
    assert capsys.readouterr().out == "a\n"


def test_without_text_the_ids_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TokenPrinter(1, has_text=False)
    for token_id in (5, 17):
        printer.push(TokenEvent(0, Token(token_id, ""), 1))
    printer.finish()
    assert capsys.readouterr().out == "5 17 \n"


def test_printer_shows_reasoning_apart(capsys: pytest.CaptureFixture[str]) -> None:
    def event(question: int, part: str, reasoning: str, answer: str) -> TokenEvent:
        token = Token(1, "<not shown>", part=part, reasoning=reasoning, answer=answer)
        return TokenEvent(question, token, 1)

    printer = TokenPrinter(1)
    for values in (("answer", "", ""), ("reasoning", "why", ""), ("reasoning", " not", ""), ("answer", "?", "so")):
        printer.push(event(0, *values))
    printer.finish()
    assert capsys.readouterr().out == "why not?\nso\n"
    printer = TokenPrinter(2)
    for question, *values in ((0, "reasoning", "a\nb", ""), (1, "answer", "", "x"), (0, "answer", "c", "d\ne")):
        printer.push(event(int(question), *map(str, values)))
    printer.finish()
    assert capsys.readouterr().out.splitlines() == ["[1 reasoning] a", "[1 reasoning] bc", "[1] d", "[1] e", "[2] x"]
