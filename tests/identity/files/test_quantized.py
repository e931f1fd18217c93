"""A quantised checkpoint computes bit for bit what a plain one computes that holds the values it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.topology import plan_shards
from protos.model.config_json import load_model_spec
from protos.model.weight_files import CheckpointError
from tests.identity.conftest import Checkpoints
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import run, three_prompts
from tests.support.quant.checkpoints import quantize_checkpoint
from workers.model.weights import load_shard, whole_model
from workers.quant.weight import QuantizedWeight

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": args}}}


def linear(form: str, **weights: Any) -> dict[str, Any]:
    config = compressed(form, **weights)
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    return config


FORMATS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq v2, zero points": GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
    "gptq int8": GPTQ | {"bits": 8, "group_size": -1, "sym": False},
    "awq": AWQ,
    "packed": compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "packed, zero points": compressed("pack-quantized", num_bits=4, strategy="channel", symmetric=False),
    "int8": compressed("int-quantized"),
    "fp8": FP8,
    "fp8 rows": compressed("float-quantized", type="float"),
}
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
TOKENS = 12


def nothing(name: str) -> bool:
    return False


def check_same(
    source: Path, folder: Path, config: dict[str, Any], layouts: list[tuple[int, int]], *,
    keep: Callable[[str], bool] = nothing, shuffled: bool = False,
) -> None:  # fmt: skip
    """Tokens and logits of both checkpoints in every layout, and the weights one by one."""
    from protos.model.json_fields import Fields
    from protos.model.quant.config import quant_scheme

    scheme = quant_scheme(Fields("config.json", {"quantization_config": config}))
    assert scheme is not None
    quantised, plain = quantize_checkpoint(source, folder, config, scheme, keep=keep, shuffled=shuffled)
    assert load_model_spec(quantised).quant == scheme
    for stages, ranks in layouts:
        found = []
        for path in (plain, quantised):
            with Pipeline(path, stages, ranks, chunk=64).keep_logits() as pipeline:
                results = run(pipeline, three_prompts(pipeline.spec.vocab_size)[:2], TOKENS)
                found.append([(result.token_ids, pipeline.logits(result)) for result in results])
        for (tokens, logits), (other_tokens, other_logits) in zip(*found, strict=True):
            assert tokens == other_tokens, (stages, ranks)
            assert torch.equal(logits, other_logits), (stages, ranks)


@pytest.mark.parametrize("form", FORMATS)
def test_experts(form: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint("qwen3_moe"), tmp_path, FORMATS[form], LAYOUTS)


@pytest.mark.parametrize("form", ["gptq", "gptq int8", "awq", "packed, zero points", "fp8"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama_bias_llama3"])
def test_dense(form: str, family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint(family), tmp_path, FORMATS[form], LAYOUTS)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
def test_inputs_in_the_order_of_activation(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = GPTQ | {"desc_act": True, "group_size": 16}
    check_same(checkpoint(family), tmp_path, config, [(1, 1), (2, 1)], shuffled=True)
    with (
        pytest.raises(CheckpointError, match=r"o_proj.*desc_act.*lower expert_parallel_size"),
        Pipeline(tmp_path / "quantised", 1, 2),
    ):
        pass


@pytest.mark.parametrize("kept", ["self_attn.v_proj", "layers.1.mlp", "layers.2."])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
def test_matrices_that_stay_plain(family: str, kept: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint(family), tmp_path, FORMATS["awq"], LAYOUTS, keep=lambda name: kept in name)


OUTPUT_MATRICES = {
    "gptq": GPTQ | {"lm_head": True},
    "gptq v2, int8, zero points": GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "sym": False, "lm_head": True},
    "packed": linear("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "packed, zero points": linear("pack-quantized", num_bits=4, strategy="channel", symmetric=False),
    "int8": linear("int-quantized"),
    "fp8 rows": linear("float-quantized", type="float"),
}


@pytest.mark.parametrize("form", OUTPUT_MATRICES)
def test_the_output_matrix(form: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint("qwen3_moe"), tmp_path, OUTPUT_MATRICES[form], LAYOUTS)
    spec = load_model_spec(tmp_path / "quantised")
    head = load_shard(tmp_path / "quantised", spec, whole_model(spec), torch.float32, "cpu").lm_head
    assert isinstance(head, QuantizedWeight)


def test_a_tied_output_matrix_of_its_own_must_be_plain(checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint("qwen3_moe"), tmp_path, OUTPUT_MATRICES["gptq"], [])
    file = tmp_path / "quantised" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    spec = load_model_spec(tmp_path / "quantised")
    with pytest.raises(CheckpointError, match=r"lm_head\."):
        load_shard(tmp_path / "quantised", spec, whole_model(spec), torch.float32, "cpu")


def test_some_plain_experts_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight: stored plain beside quantised experts"):
        check_same(checkpoint("qwen3_moe"), tmp_path, AWQ, [(1, 1)], keep=lambda name: "1.mlp.experts.3.up" in name)


def test_groups_that_a_shard_would_cut(checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint("qwen3"), tmp_path, FP8, [])
    spec = load_model_spec(tmp_path / "quantised")
    for shard in plan_shards(spec, 1, 4)[1:3]:  # the first and the last have columns of one group each
        with pytest.raises(CheckpointError, match=r"down_proj\.weight: inputs.*cut the groups of 32 to 8: lower exp"):
            load_shard(tmp_path / "quantised", spec, shard, torch.float32, "cpu")


def test_memory_is_that_of_the_codes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    check_same(checkpoint("qwen3_moe"), tmp_path, GPTQ, [])
    sizes = []
    for name in ("quantised", "plain"):
        spec = load_model_spec(tmp_path / name)
        sizes.append(load_shard(tmp_path / name, spec, whole_model(spec), torch.float32, "cpu").num_bytes)
    embeddings = 2 * 256 * 64 * 4
    assert (sizes[0] - embeddings) < (sizes[1] - embeddings) * 0.2  # 4 and 1/2 bits of 32, and norms and routers
