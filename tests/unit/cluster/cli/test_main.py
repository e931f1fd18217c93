"""`run`, `demo` and `doctor` with what is behind them replaced: output, `--json`, exit codes. And --version, --help."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.cli.main import main
from cluster.tools import demo, doctor
from cluster.tools import run as run_tool
from cluster.tools.doctor import Check, Report


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def answer(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "question": "Who?", "text": " Nobody. ", "reasoning": None, "token_ids": [7, 8], "timings": {"ttft_s": 1.25},
        "usage": {"prompt_tokens": 12_345, "cached_tokens": 0}, "prefill": {"tokens_per_s": 5000.0},
    }  # fmt: skip
    return values | changes


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `longreach run` gets; a test fills it."""
    made: list[dict[str, Any]] = []
    report = {"model": "m", "results": made, "timings": {"ready_s": 2.0, "total_s": 3.0}}
    monkeypatch.setattr(run_tool, "run_once", lambda *_: report)
    return made


def test_version_and_help() -> None:
    assert invoke("--version").output == f"longreach, version {importlib.metadata.version('longreach')}\n"
    text = invoke("--help").output
    assert all(verb in text for verb in main.commands)


def test_run_prints_answers_and_a_summary(results: list[dict[str, Any]]) -> None:
    results += [
        answer(reasoning="Hm."),
        answer(question="When?", text="Never.", usage={"prompt_tokens": 9, "cached_tokens": 9}),
    ]
    done = invoke("run", "x.yaml", "--document", "d", "--question", "Who?")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["Who?", "Hm.", "Nobody.", "When?", "Never."]
    assert done.stderr == (
        "12,345 prompt tokens read at 5,000/s, 9 from cache; first token after 1.2 s; cluster ready in 2.0 s\n"
    )
    done = invoke("run", "x.yaml", "--prompt-file", "p", "--json")
    assert json.loads(done.stdout)["results"][0]["question"] == "Who?"


def test_run_prints_ids_where_there_is_no_text(results: list[dict[str, Any]]) -> None:
    results.append(answer(question=None, text=None))
    assert json.loads(invoke("run", "x.yaml", "--token-ids", "ids.json").stdout) == [7, 8]


def test_run_refuses_input_before_anything_else(tmp_path: Path) -> None:
    done = invoke("run", str(tmp_path / "absent.yaml"))
    assert done.exit_code == 2
    assert (
        done.stderr
        == "longreach: error: input: give one of --document (with --question), --prompt-file and --token-ids\n"
    )
    done = invoke("run", str(tmp_path / "absent.yaml"), "--token-ids", "x")
    assert done.stderr == f"longreach: error: {tmp_path / 'absent.yaml'}: no such file\n"


@pytest.mark.parametrize(("right", "code"), [(2, 0), (1, 1)])
def test_demo(monkeypatch: pytest.MonkeyPatch, right: int, code: int) -> None:
    truth = "The secret code of dark river is 12345."
    questions = [
        {"question": "What?", "truth": truth, "answer": text, "right": text == truth, "depth": 0.25}
        for text in [truth] * right + ["[no]"] * (2 - right)
    ]  # fmt: skip
    report = {
        "questions": questions, "right": right, "total": 2, "tokens": 8000, "positions": "dca", "ready_s": 1.0,
        "sparse": {"mode": "sparse", "density": 0.2, "held_out_recall": 0.97}, "ttft_s": 2.0, "total_s": 9.0,
        "prefill_tokens_per_s": 4000.0, "decode_tokens_per_s": 80.0, "peak_memory_bytes": 1 << 30,
        "http": {
            "url": "http://127.0.0.1:80/v1", "text": "[no]", "is_same": right == 2, "seconds": 0.4,
            "cached_tokens": 7936,
        },
    }  # fmt: skip
    monkeypatch.setattr(demo, "run_demo", lambda *_: report)
    done = invoke("demo", "--tokens", "8k")
    assert done.exit_code == code, done.output
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == 'Asked: "What?" and so on.'
    assert lines[3].split() == ["25%", "dark", "river", "is", "12345.", "dark", "river", "is", "12345.", "right"]
    assert f"{right} of 2 right in 8,000 tokens, dca positions; ready in 1.0 s" in lines
    assert ("[no]" in lines[4]) is (right == 1)
    text = " ".join(lines)
    assert "sparse prefill visited 20.0% of the pairs; held-out rows kept 97.0% of their attention" in text
    same = "the same answer" if right == 2 else "another answer: [no]"
    assert f"over HTTP (POST http://127.0.0.1:80/v1/completions): {same}, 0.4 s, 7,936 tokens cached" in text
    assert json.loads(invoke("demo", "--json").stdout) == report
    report["http"] = None
    assert "pip install 'longreach[http]' adds OpenAI's protocols over HTTP" in invoke("demo").stdout


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("slow", 0), ("error", 1)])
def test_doctor(monkeypatch: pytest.MonkeyPatch, status: Any, code: int) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: Report((Check("cores", status, "2 logical", "get more"),)))
    done = invoke("doctor")
    assert done.exit_code == code
    assert "-> get more" in done.stdout
    done = invoke("doctor", "--json")
    assert json.loads(done.stdout)["ok"] is (code == 0)
