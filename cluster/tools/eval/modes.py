"""Ways to attend that an evaluation compares, as overrides of a YAML file: plain, yarn, dca, sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from cluster.config.configs_dir import configs_dir
from cluster.config.deployment import Deployment, fetch_model, load_config, load_deployment
from cluster.config.memory_budget import kv_token_bytes
from cluster.config.schema import ModelSection
from cluster.hub.models import model_argument
from cluster.hub.names import OnProgress
from protos.errors import UserError
from protos.model.config_json import load_model_spec
from protos.model.files import is_gguf
from protos.model.folder import explain
from protos.model.grid import largest_cell
from protos.model.spec import SparseSpec

MODES = ("plain", "yarn", "dca", "sparse")
LONG_CONFIG = "config_1m.json"  # beside config.json: the published recipe for long contexts
Settings = Mapping[str, object]  # dotted keys of the YAML
NO_SETTINGS: Settings = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Target:
    """The deployment to evaluate: a YAML file, with another checkpoint in it when `model` is given.

    The checkpoint replaces the path (and the name it is served by) and no other key.
    """

    config: Path
    model: Path | None = None

    @property
    def overrides(self) -> dict[str, object]:
        """Dotted keys that put the checkpoint in place of the YAML's."""
        if self.model is None:
            return {}
        return {"model.path": str(self.model.absolute()), "model.served_model_name": None}

    def settings(self, more: Settings = NO_SETTINGS) -> ModelSection:
        """Return section `model` of the YAML with the checkpoint and `more` dotted keys in it. Raises ConfigError."""
        return load_config(self.config, {**self.overrides, **more}).model


def find_target(
    config: Path | None, model: Path | None, on_progress: OnProgress = lambda phase, done, total: None
) -> Target:
    """Return a given YAML, that of the demo, or for a bare checkpoint one process on this machine.

    A model that is named as on a hub is downloaded, unless it is on this machine.

    Raises UserError: there is no such model or file.
    """
    model = model_argument("--model", model, on_progress=on_progress) if model is not None else None
    if model is not None and not (model if is_gguf(model) else model / "config.json").is_file():
        raise UserError(f"--model: {model}: must be a directory with config.json or a GGUF file: {explain(model)}")
    if config is not None and model is None:
        fetch_model(config, {}, on_progress)
    if config is not None:
        return Target(config, model)
    return Target(configs_dir() / ("demo.yaml" if model is None else "single.yaml"), model)


def load_mode(
    target: Target, mode: str, max_len: int, *, extra_tokens: int = 0, sparse_threshold: int | None = 0,
    kv: str = "auto", more: Settings = NO_SETTINGS,
) -> Deployment:  # fmt: skip
    """Return the deployment of one mode, with room for what it reads. Raises ConfigError or UserError.

    It stores no KV: what is measured is computed, whatever was computed before.

    Args:
        max_len: tokens of a context.
        extra_tokens: KV beside one context, for what questions about one document do not share.
        more: further dotted keys of the YAML; they go before what the mode sets.
    """
    overrides = target.overrides | mode_overrides(target, mode, max_len, sparse_threshold, more)
    overrides |= {"model.max_model_len": max_len, "model.sampling_defaults": "greedy", "kv_store.enabled": False}
    if kv != "auto":
        overrides["kv_cache.dtype"] = kv
    overrides |= more
    dense = load_deployment(target.config, overrides | {"sparse.enabled": False})
    config = dense.config
    if overrides.get("sparse.enabled"):
        sparse = SparseSpec(cell=config.sparse.cell or SparseSpec().cell)
        cell = largest_cell(replace(dense.spec, sparse=sparse))
        overrides["prefill.max_num_batched_tokens"] = max(config.prefill.max_num_batched_tokens, cell)
    if config.kv_cache.bytes is not None:
        overrides["kv_cache.bytes"] = max(config.kv_cache.bytes, kv_bytes_for(dense, max_len + extra_tokens))
    return load_deployment(target.config, overrides)


def kv_bytes_for(deployment: Deployment, tokens: int) -> int:
    """Return the bytes of each shard's KV cache that hold so many tokens, with two pages to spare."""
    return (tokens + 2 * deployment.config.kv_cache.page_size) * kv_token_bytes(deployment)


def mode_overrides(
    target: Target, mode: str, max_len: int, sparse_threshold: int | None, more: Settings = NO_SETTINGS
) -> dict[str, object]:
    """Return the dotted keys that make one checkpoint attend by `mode` up to `max_len`. Raises UserError."""
    if mode not in MODES:
        raise UserError(f"--modes: {mode}: must be among {', '.join(MODES)}")
    overrides: dict[str, object] = {"sparse.enabled": mode == "sparse"}
    settings = target.settings(more)
    if mode in ("plain", "yarn"):
        scaling: dict[str, object] = {"rope_type": "default"}
        if mode == "yarn":
            window = trained_window(settings.path)
            factor = float(max(1, math.ceil(max_len / window)))
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}
        else:
            overrides["model.allow_beyond_positions"] = True
        if settings.config_file == LONG_CONFIG:
            overrides["model.config_file"] = "config.json"
        return overrides | {"model.rope_scaling": scaling, "model.dual_chunk_attention": False}
    long = dual_chunk_overrides(target, more)
    if long is None:
        raise UserError(
            f"--modes: {mode}: {settings.path} has neither {LONG_CONFIG} nor dual_chunk_attention_config in "
            "its config.json: add the file, or set model.dual_chunk_attention in the YAML, or leave dca and sparse out"
        )
    if mode == "sparse" and sparse_threshold is not None:
        overrides["sparse.threshold"] = sparse_threshold
    return overrides | long


def dual_chunk_overrides(target: Target, more: Settings = NO_SETTINGS) -> dict[str, object] | None:
    """Return what switches dual chunk attention on, the YAML's settings or the published file; None without either."""
    settings = target.settings(more)
    section = settings.dual_chunk_attention
    if section is not None and section.enabled is not False:
        has_file = (settings.path / settings.config_file).is_file()
        return {} if has_file else {"model.config_file": "config.json"}  # of another checkpoint than the YAML's
    from_file: dict[str, object] = {"model.rope_scaling": None, "model.dual_chunk_attention": None}
    if (settings.path / LONG_CONFIG).is_file():
        return from_file | {"model.config_file": LONG_CONFIG}
    if load_model_spec(settings.path).dual_chunk is None:
        return None
    return from_file | {"model.config_file": "config.json"}


def set_aside(target: Target, mode: str, deployment: Deployment) -> list[str]:
    """Return a line for every setting of positions in the YAML that a mode has replaced by its own."""
    given, used = target.settings(), deployment.config.model
    keys = [key for key in ("rope_scaling", "dual_chunk_attention") if getattr(given, key) is not None]
    replaced = [key for key in keys if getattr(given, key) != getattr(used, key)]
    return [f"{mode}: sets model.{key} of {target.config} aside; its positions are the mode's own" for key in replaced]


def trained_window(model_dir: Path) -> int:
    """Return the positions the checkpoint was trained on, by its config.json; YaRN stretches from there."""
    spec = load_model_spec(model_dir)
    if spec.dual_chunk is not None and spec.dual_chunk.original_max_position_embeddings > 0:
        return spec.dual_chunk.original_max_position_embeddings
    if spec.rope.kind == "yarn":
        return spec.rope.original_max_position_embeddings
    return spec.max_position_embeddings
