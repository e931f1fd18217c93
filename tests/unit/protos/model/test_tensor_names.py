"""Names of tensors: the spellings of one model, what is left out without harm, and what is none of ours."""

from __future__ import annotations

import pytest

from protos.model.tensor_names import canonical, is_unused, other_names, unreadable

PLAIN = ("model.embed_tokens.weight", "model.layers.10.mlp.experts.3.up_proj.weight", "model.norm.weight")


@pytest.mark.parametrize(
    "prefix",
    ["model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.model.", "transformer.",
     "module.model.", "_orig_mod.model.", "module._orig_mod.", "_fsdp_wrapped_module.model."],
)  # fmt: skip
def test_prefixes(prefix: str) -> None:
    for name in PLAIN:
        assert canonical(prefix + name.removeprefix("model.")) == name


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight",
                                  "model.language_model.lm_head.weight", "_orig_mod.lm_head.weight"])  # fmt: skip
def test_the_output_matrix(name: str) -> None:
    assert canonical(name) == "lm_head.weight"


@pytest.mark.parametrize("name", ["visual.blocks.0.norm.weight", "transformer.h.0.attn.weight", "score.weight",
                                  "mtp.layers.0.norm.weight", "model.vision_tower.layers.0.weight"])  # fmt: skip
def test_other_names_stay(name: str) -> None:
    assert canonical(name) == name


@pytest.mark.parametrize(
    ("name", "unused"),
    [("model.layers.0.self_attn.rotary_emb.inv_freq", True), ("rotary_emb.cos_cached", True),
     ("model.layers.0.self_attn.masked_bias", True), ("visual.blocks.0.weight", True), ("mtp.fc.weight", True),
     ("model.visual.merger.weight", True), ("v_head.summary.weight", True), ("score.weight", False),
     ("lm_head.bias", False), ("model.layers.0.self_attn.q_proj.bias", False), ("model.layers.0.visual.weight", False),
     ("model.layers.0.self_attn.q_norm.weight", False), ("model.layers.0.mlp.shared_expert.up_proj.weight", False)],
)  # fmt: skip
def test_what_has_no_part_in_the_logits(name: str, unused: bool) -> None:
    assert is_unused(name) == unused


@pytest.mark.parametrize(
    ("name", "said"),
    [("q_proj.qweight", "quantized"), ("q_proj.qzeros", "quantized"), ("q_proj.g_idx", "quantized"),
     ("q_proj.scales", "quantized"), ("q_proj.weight_scale_inv", "quantized"), ("q_proj.weight.absmax", "quantized"),
     ("q_proj.weight.quant_state.bitsandbytes__nf4", "quantized"), ("q_proj.weight_packed", "quantized"),
     ("q_proj.lora_A.weight", "LoRA"), ("q_proj.base_layer.weight", "LoRA"), ("q_proj.weight", None)],
)  # fmt: skip
def test_weights_that_are_not_read(name: str, said: str | None) -> None:
    found = unreadable(["model.norm.weight", f"model.layers.0.self_attn.{name}"])
    assert (found is None) == (said is None)
    assert found is None or (found[0].endswith(name) and str(said) in found[1])


def test_a_checkpoint_of_other_names() -> None:
    assert other_names([*PLAIN, "foo"]) is None
    assert other_names([]) is None
    text = other_names(["transformer.h.0.attn.weight"])
    assert text is not None
    assert "such as transformer.h.0.attn.weight; expected are those of transformers, such as model.layers.0." in text
