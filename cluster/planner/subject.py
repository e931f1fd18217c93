"""What is planned: a cluster YAML, a config.json or a model folder, as a deployment without weights."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from cluster.config.deployment import Config, Deployment, load_deployment
from cluster.config.fit_sizes import fit_sizes
from cluster.config.topology import plan_shards
from protos.errors import UserError
from protos.model.config_json import load_model_spec
from protos.model.folder import resolve
from protos.model.grid import largest_cell
from protos.model.spec import HeadBudget, SparseSpec

ASSUMED_BUDGET = HeadBudget(n_vertical=1000, n_slash=6096)  # of most heads of Qwen's published 1M recipes


def load_subject(path: Path, device: str | None = None, kv: str = "auto", chunk: int | None = None) -> Deployment:
    """Return the deployment of a cluster YAML, or of a model in one process where only the model is named.

    Args:
        device: `cpu` or `cuda`; None: what the YAML says, else cpu.
        kv: `auto` or `int8`, the type of KV.
        chunk: most tokens of a step; None: what the YAML says.

    Raises:
        ConfigError, ModelConfigError, UserError: in one line.
    """
    given: dict[str, object] = {}
    if device is not None:
        given["cluster.device"] = device
    if kv != "auto":
        given["kv_cache.dtype"] = kv
    if chunk is not None:
        given["prefill.max_num_batched_tokens"] = chunk
    if path.suffix.lower() in (".yaml", ".yml"):
        return load_deployment(path, given)
    if not path.exists():
        raise UserError(f"CONFIG: {path}: there is no such file: name a cluster YAML, a config.json or a model folder")
    if path.is_file() and path.suffix.lower() != ".json":
        raise UserError(f"CONFIG: {path}: must be a cluster YAML, a config.json or a model folder")
    folder, name = (resolve(path), "config.json") if path.is_dir() else (path.parent, path.name)
    spec = load_model_spec(folder, config_file=name)
    sections: dict[str, dict[str, object]] = {"model": {"path": os.path.abspath(folder)}}
    if re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name):
        sections["model"]["config_file"] = name
    for key, value in given.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, {})[field] = value
    config, spec = fit_sizes(Config.model_validate(sections, context={"base_dir": Path.cwd()}), spec)
    return Deployment(config, spec, plan_shards(spec, 1, 1), spec.default_context)


def as_dense(deployment: Deployment) -> Deployment:
    """Return the deployment with every row dense."""
    return replace(deployment, spec=replace(deployment.spec, sparse=None))


def as_sparse(deployment: Deployment) -> Deployment:
    """Return the deployment with sparse prefill: its own, else with the budgets of published recipes."""
    if deployment.spec.sparse is not None:
        return deployment
    spec = replace(deployment.spec, sparse=SparseSpec(uniform=ASSUMED_BUDGET))
    prefill = deployment.config.prefill
    step = max(prefill.max_num_batched_tokens, largest_cell(spec))  # a cell is never cut
    prefill = prefill.model_copy(update={"max_num_batched_tokens": step})
    return replace(deployment, spec=spec, config=deployment.config.model_copy(update={"prefill": prefill}))
