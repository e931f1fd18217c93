"""Names of stored tensors: the spellings that are read, and what a name says about a checkpoint.

Canonical names are those of Hugging Face's causal language models: `model.layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from protos.model.files import AGAIN, ORIGINAL, shown
from protos.model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")  # of training
# The base model alone has no `model.`; in a model of images and text it is the `language_model`.
_ROOT = re.compile(
    r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.model\.|transformer\.|model\.)?"
    r"(?=(layers\.\d|embed_tokens\.|norm\.))"
)
_HEAD = re.compile(r"^(model\.|language_model\.)+(?=lm_head\.)")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv|_2)?|weight_packed|weight_zero_point|SCB)$|\.(absmax|quant_map)$"
    r"|\.quant_state\."
)
_ADAPTER = re.compile(r"\.lora_|\.base_layer\.|^base_model\.")
_UNUSED = tuple(  # stored beside a model without a part in its logits
    re.compile(pattern)
    for pattern in (
        r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)",  # computed from config.json
        r".*\.masked_bias",  # the constant of a causal mask
        r"(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\..*",  # no text
        r"(model\.)?mtp\..*",  # guesses further tokens, for speculative decoding
        r"v_head\..*",  # the value of a reinforcement learner
    )
)


def canonical(name: str) -> str:
    """Return the canonical name of a stored tensor; a name of another kind stays as it is."""
    name = _WRAPPERS.sub("", name)
    return _HEAD.sub("", name) if "lm_head." in name else _ROOT.sub("model.", name)


def is_unused(name: str) -> bool:
    """Return whether a tensor that the decoder does not read has no part in the logits."""
    return any(pattern.fullmatch(name) for pattern in _UNUSED)


def unreadable(names: Iterable[str], quantized: bool = False) -> tuple[str, str] | None:
    """Return a name of an adapter, or of quantized weights unless they are expected, and the words for it; or None."""
    for name in names:
        if not quantized and _QUANTIZED.search(name):
            return name, f"quantized weights, and config.json has no quantization_config: {AGAIN}, or {ORIGINAL}"
        if _ADAPTER.search(name):
            return name, "part of a LoRA adapter: merge it with peft (merge_and_unload), save that, and use it"
    return None


def foreign_words(name: str, spec: ModelSpec) -> str:
    """Return why a tensor is not one of the model, by its canonical name."""
    reason = "not a tensor of the model in config.json"
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    expert = re.search(r"\.experts\.(\d{1,9})\.", name)
    if layer and int(layer[1]) >= spec.num_hidden_layers:
        return f"{reason}, whose num_hidden_layers is {spec.num_hidden_layers}"
    if expert and int(expert[1]) >= spec.num_experts:
        return f"{reason}, whose num_experts is {spec.num_experts}"
    if name.endswith(".bias"):
        return f"{reason}, which has no such bias (attention_bias, mlp_bias)"
    return reason


def other_names(names: Iterable[str]) -> str | None:
    """Return what to say of a checkpoint none of whose canonical names is of a layer, None when one is."""
    names = list(names)
    if not names or any(name.startswith("model.layers.") for name in names):
        return None
    return (
        f"its tensors have other names, such as {shown(names[0])}; expected are those of transformers, such as "
        "model.layers.0.input_layernorm.weight: convert it, or use a checkpoint of the architecture in config.json"
    )
