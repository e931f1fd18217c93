"""Files of a training run: weights and states come back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.data.training import tiny_model
from workers.training import needle
from workers.training.checkpoint import COPIED, STATE_FILE, load_weights, read_state, write_directory, write_state

ASSETS = needle.ASSETS


def test_weights_come_back_rounded_once(assets: Path, tmp_path: Path) -> None:
    model = tiny_model(assets)
    write_directory(model, assets, tmp_path / "out")
    write_directory(model, assets, tmp_path / "out")  # over the first
    stored = load_weights(tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value.to(torch.bfloat16).float()), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*COPIED, "model.safetensors"])


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = write_state({"step": 67, "weights": torch.arange(193)}, tmp_path / "out")
    for place in (path, path.parent):
        state = read_state(place)
        assert state["step"] == 67
        assert torch.equal(state["weights"], torch.arange(193))
    assert [left.name for left in path.parent.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize("content", [{"format": 0}, [1, 17]])
def test_other_formats_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match="not a training state of format"):
        read_state(tmp_path)
