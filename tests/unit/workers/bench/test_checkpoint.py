"""Checkpoints of random weights: the benchmark model, and a shape in int4 and int8 as loading takes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.model.checkpoint import Checkpoint
from protos.model.config_json import load_model_spec
from tests.support.data.checkpoints import make_checkpoint
from workers.bench.__main__ import main
from workers.bench.checkpoint import write_checkpoint, write_shape
from workers.bench.model import OneProcess, benchmark_spec
from workers.eval.whole_model import SequenceFeed, WholeModel
from workers.model.weights import load_shard, whole_model
from workers.quant.rewrite import Recipe
from workers.quant.weight import QuantizedWeight, plain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("shape") / "plain", "qwen3_moe", hidden_size=64)


@pytest.mark.slow
def test_the_written_checkpoint_is_the_benchmark_model(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path / "model", layers=1)
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < stored < size + 100_000  # the header
    spec = load_model_spec(tmp_path / "model")
    assert spec == benchmark_spec(layers=1)
    Checkpoint.open(tmp_path / "model", spec)
    with pytest.raises(ValueError, match="already holds a"):
        write_checkpoint(tmp_path / "model", layers=1)
    runs = [OneProcess(tmp_path / "model", torch.bfloat16, torch.device("cpu"), 64, chunk) for chunk in (7, 64)]
    timings = [run.run(run.prompt(33), 2) for run in runs]
    assert all(timing.prefill_s > 0 and len(timing.decode_s) == 2 for timing in timings)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 16)])
def test_a_shape_is_written_quantised_and_loads(shape: Path, tmp_path: Path, bits: int, group: int) -> None:
    size = write_shape(tmp_path / "out", shape, Recipe(bits, group))
    spec = load_model_spec(tmp_path / "out")
    assert spec.quant is not None
    assert replace(spec, quant=None) == load_model_spec(shape)
    assert size == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) - 8 - _header(tmp_path)
    weights = load_shard(tmp_path / "out", spec, whole_model(spec), torch.float32, CPU)
    experts = weights.layers[0].experts_gate_up
    assert isinstance(experts, QuantizedWeight)
    values = plain(experts, torch.float32)
    assert abs(float(values.std()) - 0.02) < 0.004
    assert abs(float(values.mean())) < 0.004
    runner = WholeModel(tmp_path / "out", spec, torch.float32, CPU).runner(spec, 64, 16)
    feed = SequenceFeed(runner, 16, 33)
    feed.take(list(range(5, 38)), sample=True)
    assert 0 <= feed.tokens[-1] < spec.vocab_size


def _header(folder: Path) -> int:
    return int.from_bytes((folder / "out" / "model.safetensors").read_bytes()[:8], "little")


def test_a_shape_in_bfloat16_has_all_tensors(shape: Path, tmp_path: Path) -> None:
    write_shape(tmp_path / "out", shape, None)
    Checkpoint.open(tmp_path / "out", load_model_spec(tmp_path / "out"))


def test_what_cannot_be_written_leaves_nothing(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["make-checkpoint", str(out), "--shape", str(shape)]
    assert main([*command, "--bits", "4", "--group", "48"]) == 2
    assert "--group: 48: model.layers.0." in capsys.readouterr().err
    assert main(["make-checkpoint", str(out), "--bits", "4"]) == 2
    assert capsys.readouterr().err == "error: --bits: needs --shape DIR: the built-in model is in bfloat16\n"
    refused = (["--layers", "2"], "--layers: is for the built-in"), (["--group", "16"], "--group: needs --bits")
    for more, key in refused:
        assert main([*command, *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {key}")
    assert main(["make-checkpoint", str(out), "--shape", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()
    assert main([*command, "--bits", "4", "--group", "16"]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert main([*command]) == 2
    assert "already holds a config.json" in capsys.readouterr().err
    assert main(["make-checkpoint", str(tmp_path / "again"), "--shape", str(out)]) == 2
    assert "that of a quantised model" in capsys.readouterr().err
