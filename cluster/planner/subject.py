"""What is planned: a cluster YAML, a config.json, a model folder, a GGUF file or a model of a hub, without weights."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from cluster.config.deployment import Config, Deployment, load_deployment
from cluster.config.fit_sizes import fit_sizes
from cluster.config.topology import plan_shards
from cluster.hub.models import model_argument
from protos.errors import UserError
from protos.model.config_json import load_model_spec
from protos.model.files import is_gguf
from protos.model.grid import largest_cell
from protos.model.spec import HeadBudget, SparseSpec

_KINDS = "a cluster YAML, a config.json, a model folder or GGUF file, or a model such as Qwen/Qwen3-0.6B"
ASSUMED_BUDGET = HeadBudget(n_vertical=1000, n_slash=6096)  # of most heads of Qwen's published 1M recipes


def load_subject(path: Path, device: str | None = None, kv: str = "auto", chunk: int | None = None) -> Deployment:
    """Return the deployment of a cluster YAML, or of a model in one process where only the model is named.

    Of a model that is named as on a hub, only the settings are downloaded.

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
        return load_deployment(path, given, need="config")
    found = model_argument("CONFIG", path, "config")
    if not found.exists():
        raise UserError(f"CONFIG: {found}: there is no such file: name {_KINDS}")
    if found.is_file() and not is_gguf(found) and found.suffix.lower() != ".json":
        raise UserError(f"CONFIG: {found}: must be {_KINDS}")
    is_model = found.is_dir() or is_gguf(found)
    model, name = (found, "config.json") if is_model else (found.parent, found.name)
    spec = load_model_spec(model, config_file=name)
    sections: dict[str, dict[str, object]] = {"model": {"path": os.path.abspath(model)}}
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


def with_chunks(deployment: Deployment, dynamic: bool) -> Deployment:
    """Return the deployment with `prefill.dynamic_chunks` on or off."""
    prefill = deployment.config.prefill.model_copy(update={"dynamic_chunks": dynamic})
    return replace(deployment, config=deployment.config.model_copy(update={"prefill": prefill}))


def as_sparse(deployment: Deployment) -> Deployment:
    """Return the deployment with sparse prefill: its own, else with the budgets of published recipes."""
    if deployment.spec.sparse is not None:
        return deployment
    spec = replace(deployment.spec, sparse=SparseSpec(uniform=ASSUMED_BUDGET))
    prefill = deployment.config.prefill
    step = max(prefill.max_num_batched_tokens, largest_cell(spec))  # a cell is never cut
    prefill = prefill.model_copy(update={"max_num_batched_tokens": step})
    return replace(deployment, spec=spec, config=deployment.config.model_copy(update={"prefill": prefill}))
