"""Where tensors lie in a GGUF file, against the reference library's table of names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from protos.model.checkpoint import Checkpoint, CheckpointError, expected_tensors, fingerprint_of
from protos.model.config_json import load_model_spec
from protos.model.gguf.file import GgufError, read_gguf
from protos.model.gguf.names import find_tensors, is_turned, stored_name, stored_rows
from tests.support.data.checkpoints import make_checkpoint
from tests.support.gguf_files import _permuted, convert


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in ("qwen3_moe", "qwen2_tied", "llama_linear"):
        folder = tmp_path_factory.mktemp(family)
        made[family] = convert(make_checkpoint(folder / "hf", family, num_hidden_layers=2), folder / "m.gguf")
    return made


@pytest.mark.parametrize(("arch", "layers"), [("QWEN3MOE", 2), ("QWEN3", 2), ("QWEN2", 2), ("LLAMA", 2)])
def test_names_are_the_references(files: dict[str, Path], arch: str, layers: int) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], layers)
    spec = load_model_spec(files["qwen3_moe"])
    spec = replace(spec, qkv_bias=True, qk_norm="QWEN3" in arch, num_experts=spec.num_experts if "MOE" in arch else 0)
    for name in expected_tensors(spec):
        stored, expert = stored_name(name)
        shared = name if expert is None else name.replace(f"experts.{expert}.", "experts.")
        assert stored == names.get_name(shared, (".weight", ".bias")), name


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_tied", "llama_linear"])
def test_every_tensor_has_its_place(files: dict[str, Path], family: str) -> None:
    path = files[family]
    spec = load_model_spec(path)
    expected = expected_tensors(spec)
    places = find_tensors(read_gguf(path), expected.items())
    assert set(places) == set(expected)
    for name, (tensor, expert) in places.items():
        assert tensor.shape[expert is not None :] == expected[name]
    checkpoint = Checkpoint.open(path, spec)
    assert (checkpoint.model_dir, checkpoint.has_own_head) == (path.parent, family == "qwen3_moe")
    assert {each.file for each in checkpoint.tensors.values()} == {"m.gguf"}


def test_experts_of_a_layer_are_one_stack(files: dict[str, Path]) -> None:
    path = files["qwen3_moe"]
    tensors = Checkpoint.open(path, load_model_spec(path)).tensors
    for part in ("gate", "up", "down"):
        stored = tensors[f"model.layers.0.mlp.experts.5.{part}_proj.weight"]
        assert (stored.name, stored.expert) == (f"blk.0.ffn_{part}_exps.weight", 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 1}, "blk.1..*: not a tensor of the model"),
        ({"num_hidden_layers": 3}, "blk.2.attn_norm.weight: missing"),
        ({"hidden_size": 32}, r"token_embd.weight: shape \[256, 64\]: the model's settings ask for \[256, 32\]"),
        ({"num_experts": 4}, r"ffn_gate_inp.weight: shape \[8, 64\]"),
    ],
)
def test_disagreement_is_one_line(files: dict[str, Path], change: dict[str, int], words: str) -> None:
    path = files["qwen3_moe"]
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(path, replace(load_model_spec(path), **change))


def test_a_vector_of_blocks_is_refused(files: dict[str, Path]) -> None:
    path = files["qwen2_tied"]
    file, spec = read_gguf(path), load_model_spec(path)
    norm = file.tensors["output_norm.weight"]
    odd = replace(file, tensors=dict(file.tensors) | {norm.name: norm._replace(kind=norm.kind._replace(elements=32))})
    with pytest.raises(GgufError, match=r"output_norm\.weight: type F32: a vector must be"):
        find_tensors(odd, expected_tensors(spec).items())


def test_rows_that_rotate_together_are_found_again() -> None:
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    stored = _permuted(rows, heads)
    assert stored[stored_rows(range(len(rows)), head_dim)].tolist() == rows.tolist()
    assert stored[stored_rows(range(5, 19), head_dim)].tolist() == rows[5:19].tolist()


def test_only_llama_turns_rows() -> None:
    assert is_turned("llama", "model.layers.0.self_attn.q_proj.weight")
    assert is_turned("llama", "model.layers.11.self_attn.k_proj.bias")
    assert not is_turned("llama", "model.layers.0.self_attn.v_proj.weight")
    assert not is_turned("llama", "model.layers.0.self_attn.q_norm.weight")
    assert not is_turned("qwen2", "model.layers.0.self_attn.q_proj.weight")


def test_the_fingerprint_tells_files_apart(files: dict[str, Path], tmp_path: Path) -> None:
    first = files["qwen2_tied"]
    assert fingerprint_of(first) == fingerprint_of(first)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(bytes(data))
    assert fingerprint_of(first) != fingerprint_of(other)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint_of(tmp_path / "absent.gguf")
