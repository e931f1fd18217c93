"""What a benchmark may measure: a folder with settings, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.speed.head import check_model
from cluster.bench.speed.settings import Bench, BenchSettings
from protos.errors import UserError


def bench(model: Path | None) -> Bench:
    return Bench("a.yaml", BenchSettings.model_validate({"bench": "compare", "config": Path("/x"), "model": model}))


def test_folders_and_gguf_files_are_models(tmp_path: Path):
    (tmp_path / "config.json").touch()
    (tmp_path / "m.gguf").touch()
    for model in (None, tmp_path, tmp_path / "m.gguf"):
        check_model(bench(model))
    for missing in (tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(UserError, match=r"^a.yaml: model: .*none.*: no config.json there: name a checkpoint"):
            check_model(bench(missing))
