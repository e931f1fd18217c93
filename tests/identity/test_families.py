"""Every family computes what transformers computes: logits and 64 greedy tokens, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.model.checkpoint import Checkpoint
from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec, RopeSpec
from tests.identity.conftest import Checkpoints, Oracles
from tests.support.data.checkpoints import FAMILIES, IMAGE_FAMILIES, make_image_checkpoint, respell
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import NEW_TOKENS, check_against, run, three_prompts
from tests.support.oracles.transformers import TOLERANCE, relative_error


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 17), (1, 2, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers(
    family: str, stages: int, ranks: int, chunk: int, checkpoint: Checkpoints, oracle: Oracles
) -> None:
    folder = checkpoint(family)
    with Pipeline(folder, stages, ranks, chunk=chunk).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size))


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 17), (2, 2, 64)])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_the_text_of_a_model_of_images_equals_transformers(
    family: str, stages: int, ranks: int, chunk: int, oracle: Oracles, tmp_path: Path
) -> None:
    folder = make_image_checkpoint(tmp_path / family, family)
    with Pipeline(folder, stages, ranks, chunk=chunk).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(250))  # ids from there on stand for images


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_the_config_mean_the_same(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint(family)
    assert load_model_spec(respell(folder, tmp_path / "old")) == load_model_spec(folder)


@pytest.mark.parametrize("family", ["qwen3_moe_yarn", "qwen3_moe_raw", "llama_bias_llama3"])
def test_the_old_spelling_equals_transformers(
    family: str, checkpoint: Checkpoints, oracle: Oracles, tmp_path: Path
) -> None:
    folder = respell(checkpoint(family), tmp_path / "old")
    with Pipeline(folder, 1, 1, chunk=64).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size)[:1])


# A setting that is read wrongly must be visible in these small models, else the tests above prove little.
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe_raw", {"norm_topk_prob": True}),
    ("qwen3_moe_raw", {"qkv_bias": False}),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("qwen3_moe", {"rms_norm_eps": 1e-3}),
    ("qwen3_moe_yarn", {"rope": RopeSpec(1e4)}),
    ("qwen3_moe_yarn", {"rope": RopeSpec(1e4, "yarn", 4.0, 64, attention_factor=1.0)}),
    ("qwen3_moe_yarn", {"rope": RopeSpec(1e4, "yarn", 4.0, 256)}),
    ("qwen3", {"qk_norm": False}),
    ("qwen2", {"qkv_bias": False}),
    ("llama_bias_llama3", {"mlp_bias": False}),
    ("llama_bias_llama3", {"o_bias": False}),
    ("llama_bias_llama3", {"rope": RopeSpec(1e4)}),
    ("llama_linear", {"rope": RopeSpec(1e4)}),
]


@pytest.mark.parametrize(("family", "change"), WRONG)
def test_a_wrong_setting_would_be_seen(
    family: str, change: dict[str, Any], checkpoint: Checkpoints, oracle: Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family)
    spec = load_model_spec(folder)
    # the checkpoint's tensors are complete for the true settings only; reading fewer of them is what is tried here
    monkeypatch.setattr(Checkpoint, "open", _open_as(spec))
    prompt = three_prompts(spec.vocab_size)[0]
    with Pipeline(folder, 1, 1, spec=replace(spec, **change)).keep_logits() as pipeline:
        (result,) = run(pipeline, [prompt], 1)
        wrong = relative_error(pipeline.logits(result), oracle(folder).greedy(prompt, NEW_TOKENS).logits[:1])
    assert float(wrong) > 10 * TOLERANCE


def _open_as(true_spec: ModelSpec) -> Callable[[Path, ModelSpec], Checkpoint]:
    plain = Checkpoint.open
    return lambda model_dir, _: plain(model_dir, true_spec)
