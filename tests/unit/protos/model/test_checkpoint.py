"""The tensor index: what is accepted, and one clear error for each kind of damage. Files are written without torch."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.model.checkpoint import Checkpoint, CheckpointError, StoredTensor, expected_tensors, fingerprint_of
from protos.model.spec import ModelSpec, RopeSpec
from tests.support.paths import ROOT

WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "U8": 1}
DENSE = ModelSpec(
    model_type="qwen2", vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=2, intermediate_size=6, rms_norm_eps=1e-6, tie_word_embeddings=False, qkv_bias=True, o_bias=False,
    mlp_bias=False, qk_norm=False, rope=RopeSpec(1e4), max_position_embeddings=64, dtype="bfloat16", eos_token_ids=(0,),
)  # fmt: skip
MOE = replace(
    DENSE, model_type="qwen3_moe", qkv_bias=False, qk_norm=True, num_experts=3, num_experts_per_tok=2,
    moe_intermediate_size=5,
)  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors_of(spec: ModelSpec, dtype: str = "BF16") -> Tensors:
    return {name: (dtype, shape) for name, shape in expected_tensors(spec).items()}


def write_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file whose data is a hole: 60 GB take no room."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + offset)


def write_checkpoint(folder: Path, tensors: Tensors, files: int = 1) -> Path:
    (folder / "config.json").write_text("{}")
    if files == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        part = names[number::files]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fuse(spec: ModelSpec, tensors: Tensors, transposed: bool) -> Tensors:
    kept = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    count, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    for layer in range(spec.num_hidden_layers):
        gate_up, down = (2 * width, hidden), (hidden, width)
        if transposed:
            gate_up, down = gate_up[::-1], down[::-1]
        kept[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ("BF16", (count, *gate_up))
        kept[f"model.layers.{layer}.mlp.experts.down_proj"] = ("BF16", (count, *down))
    return kept


def test_expected_names_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}  # fmt: skip
    biased = replace(DENSE, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True)
    cases = [
        (transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)), DENSE),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)),
         replace(biased, tie_word_embeddings=False)),
        (transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)),
         replace(DENSE, qk_norm=True, qkv_bias=False)),
    ]  # fmt: skip
    for model, spec in cases:
        assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected_tensors(spec)
    assert "lm_head.weight" not in expected_tensors(biased)
    moe = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=5)
    )
    fused = {name: shape for name, (_, shape) in fuse(MOE, tensors_of(MOE), transposed=False).items()}
    assert {n: tuple(t.shape) for n, t in moe.state_dict().items()} == fused


@pytest.mark.parametrize("files", [1, 2, 5])
@pytest.mark.parametrize("spec", [DENSE, MOE, replace(MOE, mlp_only_layers=(0,))])
def test_opens_single_and_indexed_files(tmp_path: Path, spec: ModelSpec, files: int) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors_of(spec), files), spec)
    assert checkpoint.tensors.keys() == expected_tensors(spec).keys()
    assert len({stored.file for stored in checkpoint.tensors.values()}) == files


def test_mixed_dtypes(tmp_path: Path) -> None:
    tensors = tensors_of(DENSE) | {"model.norm.weight": ("F32", (8,)), "lm_head.weight": ("F16", (11, 8))}
    stored = Checkpoint.open(write_checkpoint(tmp_path, tensors), DENSE).tensors
    assert stored["model.norm.weight"] == StoredTensor("model.safetensors", "model.norm.weight", "F32")
    assert stored["lm_head.weight"].dtype == "F16"


# hidden 8: width 8 makes down square, width 4 makes gate_up square; the pair always tells
@pytest.mark.parametrize("width", [4, 5, 8, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts(tmp_path: Path, width: int, transposed: bool) -> None:
    spec = replace(MOE, moe_intermediate_size=width)
    stored = Checkpoint.open(write_checkpoint(tmp_path, fuse(spec, tensors_of(spec), transposed)), spec).tensors
    assert stored.keys() == expected_tensors(spec).keys()
    prefix = "model.layers.1.mlp.experts."
    file, gate_up = "model.safetensors", prefix + "gate_up_proj"
    assert stored[prefix + "2.gate_proj.weight"] == StoredTensor(file, gate_up, "BF16", 2, 0, transposed)
    assert stored[prefix + "2.up_proj.weight"] == StoredTensor(file, gate_up, "BF16", 2, width, transposed)
    assert stored[prefix + "0.down_proj.weight"] == StoredTensor(file, prefix + "down_proj", "BF16", 0, 0, transposed)


TIED = replace(DENSE, tie_word_embeddings=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("files", [1, 3])
def test_a_tied_output_matrix_is_left_out_when_it_is_equal(tmp_path: Path, files: int) -> None:
    write_checkpoint(tmp_path, tensors_of(DENSE), files)
    checkpoint = Checkpoint.open(tmp_path, TIED)
    assert not checkpoint.has_own_head
    assert checkpoint.tensors[EMBEDDING].name == EMBEDDING


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("at", [0, -1])
def test_a_stored_output_matrix_that_differs_in_a_byte_is_used(tmp_path: Path, files: int, at: int) -> None:
    write_checkpoint(tmp_path, tensors_of(DENSE), files)
    for path in tmp_path.glob("*.safetensors"):
        with path.open("r+b") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if HEAD in (entries := json.loads(handle.read(length))):
                start, stop = entries[HEAD]["data_offsets"]
                handle.seek(8 + length + (start if at == 0 else stop - 1))
                handle.write(b"\x01")
    checkpoint = Checkpoint.open(tmp_path, TIED)
    assert checkpoint.has_own_head
    assert checkpoint.tensors[HEAD].name == HEAD


@pytest.mark.parametrize("stored", [("F32", (11, 8)), ("BF16", (12, 8)), ("F8_E4M3", (11, 8))])
def test_a_stored_output_matrix_of_another_kind(tmp_path: Path, stored: tuple[str, tuple[int, ...]]) -> None:
    write_checkpoint(tmp_path, tensors_of(DENSE) | {HEAD: stored})
    if stored[0] == "F32":
        assert Checkpoint.open(tmp_path, TIED).has_own_head
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: (shape \[12, 8\]|dtype F8_E4M3)"):
        Checkpoint.open(tmp_path, TIED)


def test_a_tied_embedding_may_be_stored_as_the_output_matrix(tmp_path: Path) -> None:
    tensors = {HEAD if name == EMBEDDING else name: value for name, value in tensors_of(TIED).items()}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors), TIED)
    assert checkpoint.tensors[EMBEDDING].name == HEAD
    assert not checkpoint.has_own_head


def test_what_has_no_part_in_the_logits_is_left_out(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "visual.blocks.0.norm.weight", "mtp.fc.weight")
    write_checkpoint(tmp_path, tensors_of(DENSE) | dict.fromkeys(names, ("F32", (1,))))
    assert Checkpoint.open(tmp_path, DENSE).tensors.keys() == expected_tensors(DENSE).keys()


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (DENSE, {"lm_head.weight": None}, "lm_head.weight: missing.*tie_word_embeddings"),
        (DENSE, {"model.layers.1.self_attn.k_proj.bias": None}, "k_proj.bias: missing"),
        (DENSE, {"model.norm.weight": ("BF16", (9,))},
         r"model.safetensors: model.norm.weight: shape \[9\]: config.json asks for \[8\]"),
        (DENSE, {"model.norm.weight": ("F8_E4M3", (8,))}, "dtype F8_E4M3: must be one of F32, BF16, F16"),
        (DENSE, {"model.layers.0.self_attn.o_proj.bias": ("BF16", (8,))}, "o_proj.bias: not a tensor of the model"),
        (DENSE, {"model.layers.2.input_layernorm.weight": ("BF16", (8,))}, "layers.2.*num_hidden_layers is 2"),
        (DENSE, {"model.layers.0.self_attn.q_norm.weight": ("BF16", (2,))}, "q_norm.weight: not a tensor of the model"),
        (DENSE, {"score.weight": ("BF16", (2, 8))}, "score.weight: not a tensor of the model"),
        (DENSE, {"lm_head.bias": ("BF16", (11,))}, "lm_head.bias: not a tensor of the model.*has no such bias"),
        (MOE, {"model.layers.0.self_attn.q_proj.bias": ("BF16", (8,))}, "q_proj.bias: not a tensor.*no such bias"),
        (MOE, {"model.layers.0.mlp.experts.3.up_proj.weight": ("BF16", (5, 8))}, "not a tensor.*num_experts is 3"),
        (MOE, {"model.layers.0.mlp.shared_expert.up_proj.weight": ("BF16", (5, 8))}, "shared_expert.*not a tensor"),
        (DENSE, {"model.layers.0.self_attn.q_proj.qweight": ("I32", (1, 8))}, "q_proj.qweight: quantized weights"),
        (DENSE, {"model.layers.0.self_attn.q_proj.weight": ("U8", (32, 1))}, "dtype U8: must be one of.*quantized"),
        (DENSE, {"model.layers.0.self_attn.q_proj.lora_A.weight": ("BF16", (1, 8))}, "lora_A.weight: part of a LoRA"),
        (DENSE, {"model.a\nb": ("BF16", (8,))}, r"'model.a\\nb': not a tensor of the model"),
        (MOE, {"model.layers.1.mlp.experts.2.down_proj.weight": None}, "experts.2.down_proj.weight: missing"),
        (MOE, {GATE_UP: ("BF16", (3, 10, 8)), DOWN: ("BF16", (3, 8, 5))}, "also stored in a stack"),
        (MOE, {GATE_UP: ("BF16", (3, 10, 8))}, "down_proj: missing"),
        (MOE, {GATE_UP: ("BF16", (3, 10, 9)), DOWN: ("BF16", (3, 8, 5))}, r"asks for \[3, 10, 8\] or \[3, 8, 10\]"),
        (MOE, {GATE_UP: ("BF16", (3, 8, 10)), DOWN: ("BF16", (3, 8, 5))}, r"down_proj: shape.*asks for \[3, 5, 8\]"),
        (MOE, {GATE_UP: ("F8_E4M3", (3, 8, 10)), DOWN: ("BF16", (3, 5, 8))}, "gate_up_proj: dtype F8_E4M3"),
    ],
)  # fmt: skip
def test_wrong_tensors(tmp_path: Path, spec: ModelSpec, changes: dict[str, Any], message: str) -> None:
    tensors = {name: value for name, value in (tensors_of(spec) | changes).items() if value is not None}
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path, spec)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500, -1, "grown"])
def test_truncated_file(tmp_path: Path, size: int | str) -> None:
    path = write_checkpoint(tmp_path, tensors_of(DENSE), files=2) / "model-00002-of-00002.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(whole + 3 if isinstance(size, str) else size % whole)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: damaged or truncated \(.+\)"):
        Checkpoint.open(tmp_path, DENSE)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path, DENSE)
    write_checkpoint(tmp_path, tensors_of(DENSE), files=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: no such file: named by"):
        Checkpoint.open(tmp_path, DENSE)


def test_index_naming_the_wrong_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors_of(DENSE), files=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    swapped = "model-00002-of-00002.safetensors"
    assert weight_map["model.embed_tokens.weight"] != swapped
    write_index(tmp_path, weight_map | {"model.embed_tokens.weight": swapped})
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: model\.embed_tokens\.weight: not in the file"):
        Checkpoint.open(tmp_path, DENSE)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000])
def test_corrupt_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: (not valid JSON|weight_map: must be an object)"):
        Checkpoint.open(tmp_path, DENSE)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "config", "", 3, None]
)
def test_index_stays_in_its_folder(tmp_path: Path, file: Any) -> None:
    write_index(tmp_path, {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match=r"must be a \.safetensors file of this folder"):
        Checkpoint.open(tmp_path, DENSE)


COUNTS = [
    "num_experts", "num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "moe_intermediate_size",
]  # fmt: skip


@pytest.mark.parametrize("count", [16_777_215, 10**9])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("field", COUNTS)
def test_a_count_that_no_file_holds_ends_at_the_first_tensor(
    tmp_path: Path, field: str, stacked: bool, count: int
) -> None:
    spec = replace(MOE, mlp_only_layers=(1,))
    tensors = tensors_of(spec)
    if stacked:
        tensors = {name: tensors[name] for name in tensors if ".experts." not in name}
        tensors |= {GATE_UP: ("BF16", (3, 10, 8)), DOWN: ("BF16", (3, 8, 5))}
    write_checkpoint(tmp_path, tensors)
    assert ends_at_once(tmp_path, replace(spec, **{field: count}))


def test_experts_that_are_missing_alone_end_at_the_first(tmp_path: Path) -> None:
    router = {"model.layers.0.mlp.gate.weight": ("BF16", (16_777_215, 8))}
    write_checkpoint(tmp_path, tensors_of(MOE) | router)
    message = ends_at_once(tmp_path, replace(MOE, num_experts=16_777_215))
    assert "model.layers.0.mlp.experts.3.gate_proj.weight: missing from the checkpoint" in message


def test_a_stack_of_more_experts_than_any_model_has(tmp_path: Path) -> None:
    count = 16_777_215
    tensors = {name: value for name, value in tensors_of(MOE).items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        tensors[prefix + "gate.weight"] = ("BF16", (count, 8))
        tensors[prefix + "experts.gate_up_proj"] = ("BF16", (count, 10, 8))
        tensors[prefix + "experts.down_proj"] = ("BF16", (count, 8, 5))
    write_checkpoint(tmp_path, tensors)
    message = ends_at_once(tmp_path, replace(MOE, num_experts=count))
    assert "16777215 experts: at most 1048576 tensors are read" in message


def ends_at_once(folder: Path, spec: ModelSpec) -> str:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder, spec)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2.0
    return str(caught.value)


def test_a_file_that_no_index_names_is_the_cause(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors_of(DENSE), files=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(tmp_path, {name: file for name, file in weight_map.items() if file.startswith("model-00001")})
    with pytest.raises(
        CheckpointError, match=r"missing from the checkpoint: no index names model-00002-of-00002\.safe"
    ):
        Checkpoint.open(tmp_path, DENSE)


def test_fingerprint_changes_with_every_part(tmp_path: Path) -> None:
    big = {"model.embed_tokens.weight": ("F32", (100_003, 8))}
    write_checkpoint(tmp_path, tensors_of(DENSE) | big, files=2)
    seen = {fingerprint_of(tmp_path)}
    assert len(min(seen)) == 64
    assert seen == {fingerprint_of(tmp_path)}
    path = tmp_path / "model-00001-of-00002.safetensors"
    with path.open("r+b") as handle:
        data = 8 + int.from_bytes(handle.read(8), "little")
        for at in (data, (data + path.stat().st_size) // 2, path.stat().st_size - 1):
            handle.seek(at)
            handle.write(b"\x01")
            handle.flush()
            seen.add(fingerprint_of(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    seen.add(fingerprint_of(tmp_path))
    assert len(seen) == 5
    with path.open("r+b") as handle:
        handle.truncate(5)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        fingerprint_of(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        fingerprint_of(tmp_path)


def test_thirty_billion_parameters_open_quickly(tmp_path: Path) -> None:
    spec = replace(
        MOE, vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    )  # fmt: skip
    write_checkpoint(tmp_path, tensors_of(spec), files=16)
    started = time.process_time()
    checkpoint = Checkpoint.open(tmp_path, spec)
    fingerprint_of(tmp_path)
    assert time.process_time() - started < 3.0
    assert len(checkpoint.tensors) == 18867


def test_needs_no_torch() -> None:
    code = "import sys, protos.model.checkpoint, protos.model.config_json; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
