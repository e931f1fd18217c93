"""The training loop: rates, a falling loss, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.data.training import settings
from workers.training import needle
from workers.training.checkpoint import COPIED, STATE_FILE, load_weights, read_state
from workers.training.loop import Settings, StepReport, Trainer, rate_at

ASSETS = needle.ASSETS


@pytest.mark.parametrize(
    ("step", "fraction", "expected"),
    [(0, 0.0, 0.02), (49, 0.0, 1.0), (500, 0.6, 1.0), (500, 0.8, 0.51), (500, 1.0, 0.02), (500, 1.5, 0.02)],
)
def test_rate(step: int, fraction: float, expected: float) -> None:
    assert rate_at(step, fraction, 1e-3) == pytest.approx(1e-3 * expected)


def train(run: Settings, after: Callable[[Trainer], None] = lambda _: None) -> tuple[Trainer, list[StepReport]]:
    trainer, reports = Trainer(run), []

    def report(step: StepReport) -> None:
        reports.append(step)
        after(trainer)

    trainer.run(report)
    return trainer, reports


@pytest.mark.slow
def test_the_loss_falls_and_the_result_loads(assets: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer, reports = train(settings(assets, tmp_path, steps=60))
    losses = [report.answer_loss for report in reports]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    assert [report.step for report in reports] == list(range(1, 61))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    stored, trained = load_weights(tmp_path).state_dict(), trainer.model.state_dict()
    for name, value in trained.items():
        assert torch.equal(stored[name], value.to(torch.bfloat16).float()), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*COPIED, "model.safetensors", STATE_FILE])


@pytest.mark.slow
def test_resuming_is_as_if_never_stopped(assets: Path, tmp_path: Path) -> None:
    whole, _ = train(settings(assets, tmp_path / "whole", steps=6))

    def stop_at_3(trainer: Trainer) -> None:
        if trainer.step == 3:
            trainer.stop()

    _, first = train(settings(assets, tmp_path / "parts", steps=6), stop_at_3)
    assert read_state(tmp_path / "parts")["step"] == 3
    resumed, second = train(settings(assets, tmp_path / "parts", steps=6, resume=tmp_path / "parts", seed=99))
    assert [report.step for report in first + second] == [1, 2, 3, 4, 5, 6]
    assert resumed.elapsed > first[-1].elapsed
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_state_of_other_sizes_is_refused(assets: Path, tmp_path: Path) -> None:
    train(settings(assets, tmp_path, steps=1))
    other = tmp_path / "assets"
    shutil.copytree(assets, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="other sizes"):
        Trainer(settings(other, tmp_path, steps=2, resume=tmp_path))
