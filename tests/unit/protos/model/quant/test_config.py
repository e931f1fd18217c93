"""`quantization_config` of published checkpoints, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from protos.model.json_fields import Fields, ModelConfigError
from protos.model.quant.config import quant_scheme
from protos.model.quant.scheme import QuantScheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(form: str, group: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    plan = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | weights
    one = {"targets": ["Linear"], "weights": plan, "input_activations": None} | (group or {})
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": one},
    }


PACK = compressed("pack-quantized")
ACCEPTED = [
    (GPTQ, QuantScheme("gptq", 4, group=128, zero_offset=1)),
    (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, QuantScheme("gptq", 4, group=128, has_zeros=True)),
    (GPTQ | {"lm_head": True}, QuantScheme("gptq", 4, group=128, zero_offset=1, head=True)),
    (PACK | {"ignore": []}, QuantScheme("pack-quantized", 4, group=128, head=True)),
    (PACK | {"ignore": ["re:.*mlp.gate$"]}, QuantScheme("pack-quantized", 4, group=128, head=True)),
    (PACK | {"ignore": ["re:.*lm_head"]}, QuantScheme("pack-quantized", 4, group=128)),
    (PACK | {"ignore": ["re:("]}, QuantScheme("pack-quantized", 4, group=128, head=True)),
    (
        compressed("pack-quantized", {"targets": ["re:.*_proj"]}) | {"ignore": []},
        QuantScheme("pack-quantized", 4, group=128),
    ),
    (GPTQ | {"bits": 8, "group_size": -1}, QuantScheme("gptq", 8, zero_offset=1)),
    (GPTQ | {"desc_act": True}, QuantScheme("gptq", 4, group=128, zero_offset=1, ordered=True)),
    (GPTQ | {"dynamic": {"-:.*gate": {}}}, QuantScheme("gptq", 4, group=128, zero_offset=1)),
    (AWQ, QuantScheme("awq", 4, group=128, has_zeros=True)),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, QuantScheme("awq", 4, group=64, has_zeros=True)),
    (FP8, QuantScheme("fp8", 8, is_float=True, group=128, block_rows=128)),
    ({"quant_method": "fp8", "activation_scheme": "static"}, QuantScheme("fp8", 8, is_float=True)),
    (PACK, QuantScheme("pack-quantized", 4, group=128)),
    (compressed("pack-quantized", symmetric=False), QuantScheme("pack-quantized", 4, group=128, has_zeros=True)),
    (compressed("pack-quantized", num_bits=8), QuantScheme("pack-quantized", 8, group=128)),
    (compressed("pack-quantized", actorder="group"), QuantScheme("pack-quantized", 4, group=128, ordered=True)),
    (compressed("pack-quantized", actorder="weight"), QuantScheme("pack-quantized", 4, group=128)),
    (compressed("int-quantized", num_bits=8, strategy="channel"), QuantScheme("int-quantized", 8)),
    (compressed("naive-quantized", num_bits=8, strategy="tensor"), QuantScheme("int-quantized", 8)),
    (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        QuantScheme("float-quantized", 8, is_float=True, group=128, block_rows=128),
    ),
    (
        compressed("mixed-precision", {"format": "float-quantized"}, num_bits=8, type="float", strategy="channel"),
        QuantScheme("float-quantized", 8, is_float=True),
    ),
]


@pytest.mark.parametrize(("config", "expected"), ACCEPTED)
def test_published_settings(config: dict[str, Any], expected: QuantScheme) -> None:
    assert quant_scheme(Fields("config.json", {"quantization_config": config})) == expected


def test_plain_checkpoints() -> None:
    assert quant_scheme(Fields("config.json", {})) is None
    assert quant_scheme(Fields("config.json", {"quantization_config": None})) is None


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method: 'bitsandbytes': supported are gptq"),
    ({"quant_method": "mxfp4"}, "quant_method: 'mxfp4': supported are gptq (4 and 8 bits), awq (gemm, 4 bits), fp8"),
    ({"bits": 4}, "quant_method: missing: supported are"),
    ([4], "quantization_config: [4]: must be an object: supported are"),
    (GPTQ | {"bits": 3}, "bits: 3: must be 4 or 8"),
    (GPTQ | {"group_size": 24}, "group_size: 24: must be -1 or a multiple of 16"),
    (GPTQ | {"group_size": 0}, "group_size: 0: must be -1 or a multiple of 16"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin': must be gptq or gptq_v2"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format: True: must be false"),
    (GPTQ | {"lm_head": "yes"}, "lm_head: 'yes': must be true or false"),
    (PACK | {"ignore": "lm_head"}, "ignore: 'lm_head': must be a list of names"),
    (GPTQ | {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic: {'+:.*down': {'bits': 8}}: modules with settings"),
    (AWQ | {"version": "gemv"}, "version: 'gemv': must be gemm"),
    (AWQ | {"bits": 8}, "bits: 8: must be 4"),
    (AWQ | {"zero_point": False}, "zero_point: False: must be true"),
    (FP8 | {"fmt": "e5m2"}, "fmt: 'e5m2': must be e4m3"),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size: [128]: must be two whole numbers"),
    (FP8 | {"weight_block_size": [128, 8]}, "weight_block_size: [128, 8]: columns must be a multiple of 16"),
    (FP8 | {"is_checkpoint_fp8_serialized": False}, "is_checkpoint_fp8_serialized: False: the weights are plain"),
    (compressed("nvfp4-pack-quantized", type="float"), "format: 'nvfp4-pack-quantized, type float, num_bits 4'"),
    (compressed("pack-quantized", num_bits=3), "num_bits 3': supported are"),
    (compressed("pack-quantized", strategy="tensor_group"), "strategy: 'tensor_group': must be one of group, channel"),
    (compressed("float-quantized", num_bits=8, type="float", strategy="block"), "block_structure: None: must be two"),
    (PACK | {"quantization_status": "frozen"}, "quantization_status: 'frozen': must be compressed"),
    (PACK | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: 'sparse-24-bitmask': sparse"),
    (PACK | {"transform_config": {"config_groups": {"u": {}}}}, "rotated weights are not read"),
    (PACK | {"config_groups": {}}, "config_groups: missing"),
    (
        PACK | {"config_groups": PACK["config_groups"] | compressed("", {"format": "pack-quantized"}, group_size=64)
                ["config_groups"] | {"b": PACK["config_groups"]["group_0"]}},
        "several schemes in one model are not read",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        quant_scheme(Fields("config.json", {"quantization_config": config}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_old_name_of_the_section_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="compression_config"):
        quant_scheme(Fields("config.json", {"compression_config": {"format": "dense"}}))
