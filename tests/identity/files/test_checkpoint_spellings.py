"""Checkpoints that are spelled in other ways compute what transformers computes with them, in float32.

Where transformers itself reads a spelling only under another class, the plain spelling of the same weights decides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from protos.model.config_json import load_model_spec
from tests.identity.conftest import Checkpoints, Oracles
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import check_against, three_prompts
from workers.model.weights import load_shard, whole_model

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def respelled(source: Path, folder: Path, edit: Callable[[Tensors], Tensors], files: int = 1) -> Path:
    """A copy of a checkpoint with the tensors that `edit` makes of its own, in `files` files with an index."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = edit(load_file(source / "model.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        names, file = sorted(tensors)[number::files], f"model-{number + 1}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def other_head(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return tensors | {HEAD: 0.2 * torch.randn(tensors[EMBEDDING].shape, generator=generator)}


def equal_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def head_only(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


TIED = ["qwen3_tied", "qwen2_tied", "llama_linear", "qwen3_moe_dense_layer"]


@pytest.mark.parametrize("edit", [other_head, equal_head, head_only])
@pytest.mark.parametrize(
    ("family", "stages", "ranks", "files"),
    [("qwen3_tied", 1, 1, 1), ("qwen2_tied", 2, 1, 3), ("qwen3_moe_dense_layer", 2, 2, 1)],
)
def test_the_stored_output_matrix_of_a_tied_model_is_used(
    family: str, stages: int, ranks: int, files: int, edit: Callable[[Tensors], Tensors], checkpoint: Checkpoints,
    oracle: Oracles, tmp_path: Path,
) -> None:  # fmt: skip
    folder = respelled(checkpoint(family), tmp_path / "m", edit, files)
    with Pipeline(folder, stages, ranks, chunk=64).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size)[:1], 8)


@pytest.mark.parametrize("family", TIED)
def test_only_equal_matrices_share_their_memory(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    spec = load_model_spec(checkpoint(family))
    for name, edit, shared in (("equal", equal_head, True), ("other", other_head, False), ("one", head_only, True)):
        folder = respelled(checkpoint(family), tmp_path / name, edit)
        weights = load_shard(folder, spec, whole_model(spec), torch.float32, "cpu")
        assert (weights.lm_head is weights.embed) == shared
        assert weights.lm_head is not None
        table = weights.lm_head.nbytes
        plain = load_shard(checkpoint(family), spec, whole_model(spec), torch.float32, "cpu").num_bytes
        assert weights.num_bytes == plain + (0 if shared else table)


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def bare(name: str) -> str:
    return name.removeprefix("model.")


READ_BY_TRANSFORMERS: list[tuple[str, Callable[[str], str]]] = [
    ("no prefix", bare),
    ("no prefix in one layer", lambda name: bare(name) if "layers.1." in name else name),
    ("model. twice", lambda name: "model." + name),
]
OF_OTHER_CLASSES: list[tuple[str, Callable[[str], str]]] = [
    ("model.language_model.", lambda name: name.replace("model.", "model.language_model.", 1)),
    ("language_model.model.", lambda name: "language_model." + name),
    ("transformer.", lambda name: name.replace("model.", "transformer.", 1)),
    ("module.", lambda name: "module." + name),
    ("_orig_mod.", lambda name: name.replace("mlp.", "_orig_mod.mlp.").replace("model.", "_orig_mod.model.", 1)),
]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_tied"])
@pytest.mark.parametrize("spelling", [*READ_BY_TRANSFORMERS, *OF_OTHER_CLASSES], ids=lambda spelling: spelling[0])
def test_other_names_of_the_same_tensors(
    family: str, spelling: tuple[str, Callable[[str], str]], checkpoint: Checkpoints, oracle: Oracles, tmp_path: Path
) -> None:
    folder = respelled(checkpoint(family), tmp_path / "m", renamed(spelling[1]), files=2)
    reference = oracle(folder if spelling in READ_BY_TRANSFORMERS else checkpoint(family))
    with Pipeline(folder, 1, 1, chunk=64).keep_logits() as pipeline:
        check_against(pipeline, reference, three_prompts(pipeline.spec.vocab_size)[:1], 8)


YARN = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
LEFT_OUT: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"rope_parameters": YARN}),
    ("qwen3_moe", {"rope_parameters": YARN | {"truncate": None, "beta_fast": None}}),
    ("qwen2", {"rope_parameters": None, "rms_norm_eps": ..., "hidden_act": "swish"}),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 1}, "max_position_embeddings": ...}),
    ("qwen3_moe_raw", {"norm_topk_prob": ..., "decoder_sparse_step": ..., "mlp_only_layers": None}),
    ("qwen3", {"rope_parameters": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4, "layer_types": ...}),
]


@pytest.mark.parametrize(("family", "changes"), LEFT_OUT)
def test_what_config_json_leaves_out(
    family: str, changes: dict[str, Any], checkpoint: Checkpoints, oracle: Oracles, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoint(family), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with Pipeline(folder, 1, 1, chunk=64).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size)[:1], 8)
