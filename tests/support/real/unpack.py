"""A GGUF file as a model of transformers in float32: tensors unpacked by the library `gguf`, without our reader.

transformers' own reader of these files needs a package more (accelerate), and does the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def unpacked_model(path: Path) -> PreTrainedModel:
    """Return the model of a file of the architectures llama (without factors of its rotation) or qwen2."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(_values(tensor)) for tensor in reader.tensors}
    config = _config(reader, tensors)
    if config.model_type == "llama":  # rows whose halves rotate together lie beside each other there
        for name, values in tensors.items():
            if ".attn_q." in name or ".attn_k." in name:
                heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
                tensors[name] = values.unflatten(0, (heads, -1, 2)).swapaxes(1, 2).reshape(values.shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, unknown = model.load_state_dict({_name(name): values for name, values in tensors.items()}, strict=False)
    assert not unknown, unknown
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    return model.eval()


def _values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, what, kind = name.split(".")
        return f"model.layers.{layer}.{_NAMES[what]}.{kind}"
    what, kind = name.split(".")
    return f"{_OUTSIDE[what]}.{kind}"


def _config(reader: gguf.GGUFReader, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the settings; those of end and begin are left out, as nothing here generates."""

    def setting(key: str) -> Any:
        return reader.fields[f"{arch}.{key}"].contents()

    arch = reader.fields["general.architecture"].contents()
    return AutoConfig.for_model(
        arch, vocab_size=len(tensors["token_embd.weight"]), hidden_size=setting("embedding_length"),
        num_hidden_layers=setting("block_count"), num_attention_heads=setting("attention.head_count"),
        num_key_value_heads=setting("attention.head_count_kv"), intermediate_size=setting("feed_forward_length"),
        max_position_embeddings=setting("context_length"), hidden_act="silu", use_sliding_window=False,
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": setting("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )  # fmt: skip
