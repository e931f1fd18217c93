"""A GGUF file loads as the checkpoint that it was made from, in every layout; blocks as the reference unpacks them."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from protos.model.config_json import load_model_spec
from tests.support.data.checkpoints import make_checkpoint
from tests.support.fakes.events import Events
from tests.support.gguf_files import convert
from tests.unit.workers.model.test_weights import shards
from workers.kernels.upload import Uploads
from workers.model import compiled
from workers.model.weights import ShardWeights, load_shard, whole_model
from workers.quant.packed import PackedWeight, look_up
from workers.quant.weight import RowStack, Weight


def assert_equal(ours: ShardWeights, theirs: ShardWeights) -> None:
    for name in ("embed", "norm", "lm_head"):
        assert_same(getattr(ours, name), getattr(theirs, name))
    assert len(ours.layers) == len(theirs.layers)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for each in fields(mine):
            assert_same(getattr(mine, each.name), getattr(other, each.name))


def assert_same(mine: torch.Tensor | None, other: torch.Tensor | None) -> None:
    assert (mine is None) == (other is None)
    assert mine is None or other is None or torch.equal(mine, other)


@pytest.mark.parametrize("family", ["llama_linear", "llama_bias", "qwen3_moe", "qwen2", "qwen3_tied"])
def test_every_layout_is_that_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama_bias" else {}
    folder = make_checkpoint(tmp_path / "hf", family.removesuffix("_bias"), num_hidden_layers=2, **changes)
    path, spec = convert(folder, tmp_path / "m.gguf"), load_model_spec(folder)
    for stages, ranks in ((1, 1), (2, 2), (1, 4)):
        for shard in (shard for stage in shards(spec, stages, ranks) for shard in stage):
            ours, theirs = (load_shard(each, spec, shard, torch.float32, "cpu") for each in (path, folder))
            assert_equal(ours, theirs)


def test_mixed_blocks_are_unpacked_as_the_reference_does(tmp_path: Path) -> None:
    kinds = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q4_1, "attn_k": Kind.Q5_0, "attn_v": Kind.Q5_1, "ffn_up": Kind.F16}
    folder = make_checkpoint(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64)

    def kind_of(name: str) -> Kind:
        return next((kind for part, kind in kinds.items() if part in name), Kind.Q4_0)

    path = convert(folder, tmp_path / "m.gguf", kind_of)
    spec = load_model_spec(path)
    weights = load_shard(path, spec, whole_model(spec), torch.float32, "cpu")
    stored = {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
        for each in gguf.GGUFReader(path).tensors
    }
    assert torch.equal(weights.embed, stored["token_embd.weight"])
    assert torch.equal(weights.lm_head, stored["output.weight"])
    for number, layer in enumerate(weights.layers):
        one = {
            name.split(".", 2)[2].removesuffix(".weight"): v for name, v in stored.items() if f"blk.{number}." in name
        }
        assert torch.equal(layer.qkv_weight, torch.cat([one[f"attn_{x}"] for x in "qkv"]))
        assert torch.equal(layer.router, one["ffn_gate_inp"])
        assert torch.equal(layer.experts_gate_up, torch.cat([one["ffn_gate_exps"], one["ffn_up_exps"]], dim=1))
        assert torch.equal(layer.experts_down, one["ffn_down_exps"])


def test_unpacked_blocks_go_to_a_device_through_its_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64)
    path, events = convert(folder, tmp_path / "m.gguf", lambda name: Kind.Q4_0), Events()
    spec = load_model_spec(path)
    plain = load_shard(path, spec, whole_model(spec), torch.float32, "cpu")
    monkeypatch.setattr("workers.model.weights.Uploads", partial(Uploads, make_event=events, kind="cpu", pin=False))
    assert_equal(load_shard(path, spec, whole_model(spec), torch.float32, "cpu"), plain)
    assert events.calls.count(("record", 1)) > 10


KEPT = {"token_embd": Kind.Q5_0, "attn_v": Kind.Q8_0, "output": Kind.Q8_0, "ffn_gate_inp": Kind.F32}


def kept_kind(name: str) -> Kind:
    return next((kind for part, kind in KEPT.items() if name.startswith(part) or f".{part}." in name), Kind.Q4_1)


def wide(weight: Weight) -> torch.Tensor:
    assert not isinstance(weight, torch.Tensor)
    return weight.dequantize(torch.float32)


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_tied"])
def test_blocks_stay_as_they_are_in_bfloat16(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64} if "moe" in family else {"intermediate_size": 128}
    folder = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=2, vocab_size=320, **sizes)
    path = convert(folder, tmp_path / "m.gguf", kept_kind)
    spec = load_model_spec(path)
    whole = whole_model(spec)
    kept, unpacked = (load_shard(path, spec, whole, dtype, "cpu") for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(kept.embed, PackedWeight)
    assert isinstance(kept.lm_head, PackedWeight)
    assert (kept.lm_head is kept.embed) == ("tied" in family)
    assert torch.equal(wide(kept.embed), unpacked.embed)
    assert torch.equal(wide(kept.lm_head), unpacked.lm_head)
    ids = torch.tensor([3, 319, 16, 3])
    assert isinstance(unpacked.embed, torch.Tensor)
    assert torch.equal(look_up(kept.embed, ids), unpacked.embed[ids].to(torch.bfloat16))
    for mine, other in zip(kept.layers, unpacked.layers, strict=True):
        assert isinstance(mine.qkv_weight, RowStack)  # values have another type
        for name in ("qkv_weight", "o_weight", "gate_up", "down", "experts_gate_up", "experts_down"):
            ours, theirs = getattr(mine, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:  # zero points are rounded to float16
                assert torch.allclose(wide(ours), theirs, rtol=0, atol=2**-9 * float(theirs.abs().max()))
        assert mine.router is None or isinstance(mine.router, torch.Tensor)
    assert kept.num_bytes < 0.5 * unpacked.num_bytes


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
def test_what_cannot_be_packed_is_unpacked(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen3_tied", num_hidden_layers=1, vocab_size=321, intermediate_size=32)
    path = convert(folder, tmp_path / "m.gguf", kept_kind)
    spec = load_model_spec(path)
    whole, *parts = (shard for ranks in (1, 4) for shard in shards(spec, 1, ranks)[0])
    weights = load_shard(path, spec, whole, torch.bfloat16, "cpu")
    assert isinstance(weights.embed, torch.Tensor)  # 321 rows
    for part in parts:
        assert isinstance(load_shard(path, spec, part, torch.bfloat16, "cpu").layers[0].down, torch.Tensor)  # 8 columns
