"""The run on samples: stages, what is counted, what is written, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from workers.training.checkpoint import STATE_FILE, load_weights, read_state
from workers.training.data import Batch
from workers.training.ruler.trainer import RulerSettings, RulerTrainer, Stages


def settings(assets: Path, samples: Path, out: Path, **more: object) -> RulerSettings:
    return RulerSettings(out=out, assets=assets, data=samples, batch_tokens=(384, 640), **more)  # type: ignore[arg-type]


def test_lengths_begin_one_after_the_other() -> None:
    stages, rng = Stages([512, 1024, 2048]), np.random.default_rng(0)
    picked = {at: {stages.pick_at(at, rng) for _ in range(60)} for at in (0.0, 0.119, 0.13, 0.3, 0.99)}
    assert picked == {
        0.0: {512}, 0.119: {512}, 0.13: {512, 1024}, 0.3: {512, 1024, 2048}, 0.99: {512, 1024, 2048},
    }  # fmt: skip
    stages.record(1024, 1, 1)
    stages.record(2048, 1, 2)
    assert stages.accuracy == 0.5  # of the current length alone


def test_a_run_writes_a_checkpoint_and_resumes(assets: Path, samples: Path, tmp_path: Path) -> None:
    trainer = RulerTrainer(settings(assets, samples, tmp_path, steps=4))
    reports = []

    def report(step: object) -> None:
        reports.append(step)
        if len(reports) == 2:
            trainer.stop()

    trainer.run(report)
    assert read_state(tmp_path)["step"] == 2
    assert list(reports[-1].tasks) == ["niah_multikey_2"]
    assert "niah_multikey_2" in reports[-1].line()
    assert json.loads(reports[-1].json())["tasks"] == reports[-1].tasks
    names = {"config.json", "config_1m.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"model.safetensors", STATE_FILE}
    stored = load_weights(tmp_path).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(stored[name], value.to(torch.bfloat16).float()), name
    rows = json.loads((tmp_path / "config_1m.json").read_text())["vocab_size"]
    assert rows == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() <= rows

    resumed = RulerTrainer(settings(assets, samples, tmp_path, steps=4, resume=tmp_path))
    assert resumed.step == 2
    resumed.run(reports.append)
    assert [step.step for step in reports] == [1, 2, 3, 4]

    whole = RulerTrainer(settings(assets, samples, tmp_path / "whole", steps=4))
    whole.run(lambda step: None)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_saves_after_so_many_steps(assets: Path, samples: Path, tmp_path: Path) -> None:
    trainer = RulerTrainer(settings(assets, samples, tmp_path, steps=3, save_steps=2))
    saved: list[int] = []
    trainer.save = lambda: saved.append(trainer.step)  # type: ignore[method-assign]
    trainer.run(lambda step: None)
    assert saved == [2, 3]


def test_outputs_in_any_order_are_right(assets: Path, samples: Path, tmp_path: Path) -> None:
    trainer = RulerTrainer(settings(assets, samples, tmp_path, steps=1))
    trainer._tasks, trainer._rows = ["cwe", "vt"], [3, 3]
    targets, weights = torch.tensor([7, 8, 9, 7, 8, 9]), torch.tensor([5.0, 1.0, 5.0, 5.0, 1.0, 5.0])
    batch = Batch(torch.zeros(1, 1), torch.zeros(6), targets, weights, torch.zeros(6, dtype=torch.bool))
    assert trainer.count(batch, torch.tensor([9, 0, 7, 9, 0, 9])) == {"cwe": 1.0, "vt": 0.5}


def test_without_samples(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data"):
        RulerTrainer(settings(assets, tmp_path, tmp_path / "out", steps=1))
