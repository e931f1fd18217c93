"""Whole checkpoints: what is written is read back by the loader and by compressed-tensors, and says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from protos.model.checkpoint import Checkpoint
from protos.model.config_json import load_model_spec
from tests.support.data.checkpoints import make_checkpoint
from workers.model.weights import load_shard, whole_model
from workers.quant import rewrite as module
from workers.quant.rewrite import KINDS, Recipe, kind_of, rewrite
from workers.quant.weight import QuantizedWeight, plain

CPU = torch.device("cpu")


def _rewritten(tmp_path: Path, family: str, recipe: Recipe) -> tuple[Path, Path, dict]:
    source, target = make_checkpoint(tmp_path / "source", family), tmp_path / "target"
    target.mkdir()
    steps: list[tuple[int, int]] = []
    report = rewrite(source, target, load_model_spec(source), recipe, lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == report["weights"]
    return source, target, report


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "llama"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_loader_reads_what_was_written(tmp_path: Path, family: str, bits: int) -> None:
    source, target, report = _rewritten(tmp_path, family, Recipe(bits, 16))
    spec = load_model_spec(target)
    assert spec.quant is not None
    assert (spec.quant.format, spec.quant.bits, spec.quant.group) == ("pack-quantized", bits, 16)
    before = load_shard(source, load_model_spec(source), whole_model(spec), torch.float32, CPU)
    after = load_shard(target, spec, whole_model(spec), torch.float32, CPU)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert isinstance(other.o_weight, QuantizedWeight)
        lost = float((plain(one.o_weight, torch.float32) - plain(other.o_weight, torch.float32)).norm())
        assert 0 < lost < (0.15 if bits == 4 else 0.01) * float(plain(one.o_weight, torch.float32).norm())
    assert torch.equal(before.embed, after.embed)
    assert all(0 < error["relative_error"] < (0.15 if bits == 4 else 0.01) for error in report["errors"])


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    source, target = make_checkpoint(tmp_path / "source", "qwen3_moe"), tmp_path / "target"
    target.mkdir()
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"IN: {name}: has NaN or infinite values: the checkpoint is damaged"):
        rewrite(source, target, load_model_spec(source), Recipe(4, 16), lambda *_: None)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_is_quantised_on_demand(tmp_path: Path, bits: int) -> None:
    source, target, report = _rewritten(tmp_path, "qwen3_moe", Recipe(bits, 16, KINDS))
    (error,) = (error for error in report["errors"] if error["kind"] == "head")
    assert error["layer"] is None
    assert 0 < error["relative_error"] < (0.15 if bits == 4 else 0.01)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["ignore"] == [r"re:.*\.mlp\.gate"]
    spec = load_model_spec(target)
    before, after = (
        load_shard(folder, load_model_spec(folder), whole_model(spec), torch.float32, CPU).lm_head
        for folder in (source, target)
    )
    assert isinstance(after, QuantizedWeight)
    one, other = plain(before, torch.float32), plain(after, torch.float32)
    assert float((one - other).norm() / one.norm()) == pytest.approx(error["relative_error"], rel=1e-3)


def test_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    source, target = make_checkpoint(tmp_path / "source", "qwen3"), tmp_path / "target"
    target.mkdir()
    spec = replace(load_model_spec(source), tie_word_embeddings=True)
    with pytest.raises(ValueError, match="--only: head: the output matrix of this model is its embedding"):
        rewrite(source, target, spec, Recipe(4, 16, KINDS), lambda *step: None)
    assert not any(target.iterdir())


def test_compressed_tensors_reads_it(tmp_path: Path) -> None:
    _, target, _ = _rewritten(tmp_path, "qwen3_moe", Recipe(4, 16))
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    arguments = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    stored = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj."
    parts = {part: stored[name + part] for part in ("weight_packed", "weight_scale", "weight_shape")}
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = library.decompress(parts, QuantizationScheme(targets=["Linear"], weights=arguments))["weight"]
    spec = load_model_spec(target)
    ours = load_shard(target, spec, whole_model(spec), torch.float32, CPU).layers[1]
    assert torch.equal(plain(ours.experts_down[2], torch.float32), theirs.float())


def test_kinds_that_are_left_out_stay_plain(tmp_path: Path) -> None:
    source, target, report = _rewritten(tmp_path, "qwen3_moe", Recipe(8, 16, ("experts",)))
    assert {error["kind"] for error in report["errors"]} == {"experts"}
    checkpoint = Checkpoint.open(target, load_model_spec(target))
    assert not checkpoint.is_quantized("model.layers.0.self_attn.q_proj.weight")
    assert checkpoint.is_quantized("model.layers.0.mlp.experts.0.up_proj.weight")
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", r"re:.*\.mlp\.gate", r"re:.*\.self_attn\..*", r"re:.*\.mlp\.[a-z]+_proj"]
    assert json.loads((source / "config.json").read_text()).get("quantization_config") is None


def test_several_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 20_000)
    _, target, report = _rewritten(tmp_path, "qwen3", Recipe(4, 16))
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["bytes"]
    spec = load_model_spec(target)
    assert load_shard(target, spec, whole_model(spec), torch.float32, CPU).layers


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    source, target = make_checkpoint(tmp_path / "source", "qwen3"), tmp_path / "target"
    target.mkdir()
    with pytest.raises(ValueError, match=r"--group: 48: model\.layers\..* inputs: must divide them, such as \d+$"):
        rewrite(source, target, load_model_spec(source), Recipe(4, 48), lambda *step: None)
    assert not any(target.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.mlp.up_proj.weight", "mlp"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "experts"),
        ("model.layers.3.mlp.gate.weight", ""),
        ("model.layers.3.self_attn.q_proj.bias", ""),
        ("model.embed_tokens.weight", ""),
        ("lm_head.weight", "head"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
