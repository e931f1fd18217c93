"""`longreach run` without a cluster: what input is refused before anything starts, and the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.engine.outputs import Generation, Timings
from cluster.engine.runtime import ClusterRuntime
from cluster.scheduler.request import FinishReason
from cluster.text.prompts import PromptError
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from cluster.tools import run
from cluster.tools.display import Display
from cluster.tools.run import RunInput, run_once
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import SampledToken, TokenLogprob
from tests.support.paths import NEEDLE

SAMPLES = tuple(SampledToken(0, token, -0.5, (TokenLogprob(token, -0.5),)) for token in (7, 8))


class Canned(ClusterRuntime):
    """A session that starts nothing and answers every prompt with the same two tokens."""

    def start(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[Generation]:
        timings, text = Timings(0.0, 1.0, 1.0, 0.5, 1.5), "two words" if self._tokenizer else ""
        return [
            Generation((7, 8), text, None, FinishReason.LENGTH, SAMPLES, len(prompt), 0, timings)
            for prompt in prompts
        ]  # fmt: skip


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs over a copy of the needle model in `tmp_path / "model"`."""
    monkeypatch.setattr(run, "ClusterRuntime", Canned)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NEEDLE / name, model / name)
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: model, load_format: dummy}\ndata_dir: data\n")

    def once(options: AnswerOptions | None = None, **given: Any) -> dict[str, Any]:
        return run_once(
            config, RunInput(**given), options or AnswerOptions(max_tokens=2), Display(Console(quiet=True), quiet=True)
        )

    return once


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "input: give one of --document"),
        ({"document": Path("d"), "token_ids": Path("t"), "questions": ("q",)}, "input: give one of --document"),
        ({"prompt_file": Path("p"), "token_ids": Path("t")}, "input: give one of"),
        ({"document": Path("d")}, "--document: needs at least one --question"),
        ({"prompt_file": Path("p"), "questions": ("q",)}, "--question: needs a --document"),
    ],
)
def test_exactly_one_input(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        RunInput(**given)


def test_a_document_with_questions(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = ask(document=write(tmp_path / "d.txt", "In the beginning."), questions=("Who?", "When?"))
    assert report["model"] == "model"
    assert [(answer["question"], answer["text"]) for answer in report["results"]] == [
        ("Who?", "two words"),
        ("When?", "two words"),
    ]
    assert set(report["timings"]) == {"ready_s", "total_s"}


def test_a_raw_prompt(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (answer,) = ask(prompt_file=write(tmp_path / "p.txt", "In the beginning."))["results"]
    assert answer["question"] is None
    assert answer["usage"]["prompt_tokens"] == len(
        TextTokenizer.open(NEEDLE).encode("In the beginning.", add_special=True)
    )


def test_token_ids_with_and_without_a_tokenizer(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    ids = write(tmp_path / "ids.json", json.dumps([5, 6, 7]))
    (full,) = ask(token_ids=ids)["results"]
    assert full["text"] == "two words"
    assert all(isinstance(entry["token"], str) for entry in full["logprobs"])
    (tmp_path / "model" / "tokenizer.json").unlink()
    (bare,) = ask(token_ids=ids)["results"]
    assert bare["text"] is bare["reasoning"] is None
    assert [(entry["token"], entry["top"][0]["token"]) for entry in bare["logprobs"]] == [(None, None)] * 2
    assert bare["token_ids"] == full["token_ids"] == [7, 8]
    with pytest.raises(UserError, match=r"^stop: 'x': needs .*/model/tokenizer.json: use stop_token_ids$"):
        ask(AnswerOptions(max_tokens=2, stop=("x",)), token_ids=ids)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: does not exist: text needs it"):
        ask(prompt_file=ids)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1,", "ids.json: not JSON"), ("{}", "ids.json: must be a JSON list"), ("[]", "0 tokens"),
        ("[1, 2, 9999999]", "9999999 at index 2"), ("[" + "1, " * 4096 + "1]", "max_model_len is 4096"),
    ],
)  # fmt: skip
def test_token_ids_that_cannot_be_used(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, content: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        ask(token_ids=write(tmp_path / "ids.json", content))


def test_files_that_cannot_be_used_are_named(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for name in ("document", "prompt_file", "token_ids"):
        questions = ("Who?",) if name == "document" else ()
        with pytest.raises(UserError, match=r"absent: cannot be read \(No such file"):
            ask(questions=questions, **{name: tmp_path / "absent"})
    with pytest.raises(PromptError, match=r"bad.txt: prompt: byte 0xff at offset 1 is not UTF-8"):
        ask(prompt_file=write(tmp_path / "bad.txt", b"a\xff"))
    with pytest.raises(UserError, match=r"bad.bin: is binary: must be text, PDF"):
        ask(document=write(tmp_path / "bad.bin", b"a\0b"), questions=("Who?",))
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(1 << 34)  # sparse; it is refused by its size alone
    with pytest.raises(PromptError, match=r"large.txt: prompt: 17179869184 bytes are at least"):
        ask(prompt_file=large)
    with pytest.raises(PromptError, match=r"large.txt: 17179869184 bytes: must be at most \d+ for max_model_len 4096"):
        ask(token_ids=large)
