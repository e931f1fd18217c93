"""The table of what formats lose: our logits of a whole text, differences, rows, and the command's errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.model.config_json import load_model_spec
from tests.support.data.checkpoints import make_checkpoint
from workers.eval import accuracy
from workers.eval.accuracy import AccuracySetup, difference, lines, main, our_logits, run_accuracy, weight_bytes
from workers.eval.whole_model import SequenceFeed, WholeModel

IDS = tuple((7 * i) % 251 for i in range(70))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("accuracy") / "tiny", "qwen2_tied")


def test_logits_of_a_text_are_those_of_its_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_CHUNK", 32)
    found = our_logits(path, torch.float32, IDS)
    spec = load_model_spec(path)
    runner = WholeModel(path, spec, torch.float32, torch.device("cpu")).runner(spec, len(IDS), 64)
    feed = SequenceFeed(runner, 64, len(IDS), keep_logits=True)
    for token in IDS:
        feed.take([token])
    torch.testing.assert_close(found, torch.cat(feed.logits), atol=1e-4, rtol=1e-4)


def test_differences_are_means_over_all_positions() -> None:
    reference = torch.zeros(100, 2)
    other = torch.zeros(100, 2)
    reference[:, 0] = other[:, 0] = 1.0
    other[70] = torch.tensor([0.0, 2.0])
    found = difference(reference, other)
    p, q = torch.tensor([1.0, 0.0]).double().softmax(0), torch.tensor([0.0, 2.0]).double().softmax(0)
    kl = float((p * (p / q).log()).sum())
    assert found["same_top1"] == 0.99
    assert math.isclose(found["kl_max"], kl, rel_tol=1e-9)
    assert math.isclose(found["kl_mean"], kl / 100, rel_tol=1e-9)


def test_a_row_a_checkpoint_and_what_the_reference_cannot_read(path: Path) -> None:
    def theirs(model: Path, dtype: torch.dtype, ids: Any) -> torch.Tensor:
        if dtype == torch.bfloat16:
            raise ImportError("install\nit")
        return our_logits(model, dtype, ids)

    said: list[str] = []
    rows = run_accuracy(AccuracySetup(path, (), IDS, torch.bfloat16), said.append, theirs)
    exact, rounded = rows
    assert said == ["tiny in float32", "tiny"]
    assert exact["between"] == {"same_top1": 1.0, "kl_mean": 0.0, "kl_max": 0.0}
    assert exact["bytes"] == weight_bytes(path) == (path / "model.safetensors").stat().st_size
    assert rounded["reference"] == {"problem": "ImportError: install it"}
    assert 0 < rounded["ours"]["kl_mean"] < 0.01
    head, rule, _, last = lines(rows)
    assert head.count("|") == rule.count("|") == last.count("|") == 9
    assert "cannot read it" in last


def test_the_command_writes_its_rows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(accuracy, "text_ids", lambda model, document, count: IDS[:count])
    monkeypatch.setattr(accuracy, "their_logits", our_logits)
    document, out = tmp_path / "a.txt", tmp_path / "out.json"
    document.write_text("a")
    assert (
        main([str(path), "--document", str(document), "--tokens", "9", "--dtype", "float32", "--json", str(out)]) == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 4
    result = json.loads(out.read_text())
    assert result["config"] == {"document": "a.txt", "tokens": 9, "dtype": "float32"}
    assert result["rows"][1]["between"]["same_top1"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/none", "--document", "/x"], "error: /none: is not there"),
        (["/", "--document", "/", "--tokens", "0"], "--tokens: 0"),
    ],
)
def test_errors_are_one_line(arguments: list[str], expected: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
