"""A GGUF file of mixed blocks computes what transformers computes with the same weights unpacked, in float32."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from protos.model.config_json import load_model_spec
from tests.identity.conftest import Oracles
from tests.support.data.checkpoints import make_checkpoint
from tests.support.fakes.pipeline import Pipeline
from tests.support.gguf_files import convert
from tests.support.oracles.checks import check_against, three_prompts

MIXED = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q5_0, "attn_k": Kind.Q5_1, "attn_v": Kind.F16, "ffn_down": Kind.Q4_1}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64}


def kind_of(name: str) -> Kind:
    """Return the type of a matrix in the file; routers stay wide, as llama.cpp leaves them."""
    if "ffn_gate_inp" in name:
        return Kind.F32
    return next((kind for part, kind in MIXED.items() if part in name), Kind.Q4_0)


def unpacked_by_the_reference(folder: Path) -> None:
    """Round the weights of a checkpoint as the file does; rows are rounded alone, so their order changes nothing."""
    tensors = load_file(folder / "model.safetensors")
    parts = {"embed_tokens": "token_embd", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
             "down_proj": "ffn_down", "mlp.gate.weight": "ffn_gate_inp"}  # fmt: skip
    for name, values in tensors.items():
        kind = kind_of(next((stored for part, stored in parts.items() if part in name), name))
        if values.dim() > 1 and kind != Kind.F32:
            rounded = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind)
            tensors[name] = torch.from_numpy(rounded.astype("float32").reshape(values.shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("family", ["llama_linear", "qwen2_tied", "qwen3_moe_yarn", "qwen3"])
def test_a_file_equals_transformers(tmp_path: Path, family: str, stages: int, ranks: int, oracle: Oracles) -> None:
    folder = make_checkpoint(tmp_path / "hf", family, **SIZES)
    path = convert(folder, tmp_path / "m.gguf", kind_of)
    unpacked_by_the_reference(folder)
    assert load_model_spec(path).dtype == "bfloat16"
    with Pipeline(path, stages, ranks, chunk=64).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size), 16)
