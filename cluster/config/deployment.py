"""Load one YAML file into a checked deployment.

`load_config` checks the file by itself; `load_deployment` also reads the model's config.json and checks the layout and
the context length against it. Every fault is a ConfigError of one line that names file, line, key and value.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cluster.common.units import format_count
from cluster.config.fit_sizes import fit_sizes
from cluster.config.sampling_defaults import sampling_defaults
from cluster.config.schema import Config
from cluster.config.section import RULE_BETWEEN_KEYS, absolute_path, rule_of
from cluster.config.topology import LayoutError, plan_shards
from cluster.config.yaml_source import ConfigError, ConfigSource, KeyPath, Problem
from cluster.hub.models import find_model
from cluster.hub.names import HubError, Need, OnProgress
from protos.jobs.sampling import SamplingParams
from protos.model.config_json import load_model_spec
from protos.model.files import is_gguf
from protos.model.folder import explain
from protos.model.grid import largest_cell
from protos.model.json_fields import ModelConfigError
from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec

__all__ = ["Config", "ConfigError", "Deployment", "load_config", "load_deployment"]

_OVERRIDE_KEYS: Mapping[str, KeyPath] = {  # of `load_model_spec`; the last is checked against the others
    "rope_scaling": ("model", "rope_scaling"), "sparse": ("sparse",), "dual_chunk": ("model", "dual_chunk_attention"),
}  # fmt: skip


@dataclass(frozen=True)
class Deployment:
    """A configuration that fits its model: what the launcher starts.

    `max_model_len` is in tokens: what the YAML says, else what the positions cover, of which KV may hold less (see
    `limits_context`). Sizes of pages, cells and steps that the YAML leaves out fit the others. `sampling` has the
    values for requests that say nothing.
    """

    config: Config
    spec: ModelSpec
    shards: tuple[ShardSpec, ...]
    max_model_len: int
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @property
    def kv_store_path(self) -> Path | None:
        """The folder of stored KV, on every node; None: KV is not stored. That of dummy weights is worth nothing."""
        store = self.config.kv_store
        if not store.enabled or self.config.model.load_format == "dummy":
            return None
        return store.path or self.config.data_dir / "kv"

    @property
    def limits_context(self) -> bool:
        """Whether contexts are limited to what KV holds: nobody has asked for a length."""
        return self.config.model.max_model_len is None


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Config:
    """Return the checked configuration of one YAML file. Raises ConfigError.

    Args:
        overrides: values by dotted key (`{"model.max_model_len": "32k"}`), applied over the file before any check;
            paths in it are relative to the file too.
    """
    return _validate(ConfigSource(path, overrides or {}))


def load_deployment(
    path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None, *, need: Need = "weights",
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Deployment:  # fmt: skip
    """Return one YAML file with its model's config.json; layout, context length and grid fit. Raises ConfigError.

    Args:
        need: what of a model that is named as on a hub must be on this machine; it is downloaded where it is not.
        on_progress: called while it is downloaded.
    """
    source = ConfigSource(path, overrides or {})
    config = _with_model(source, _validate(source), need, on_progress)
    config, spec = fit_sizes(config, _load_spec(source, config))
    try:
        cluster = config.cluster
        sizes = cluster.pipeline_parallel_size, cluster.expert_parallel_size
        shards = plan_shards(spec, *sizes, cluster.stage_layers)
    except LayoutError as error:
        raise source.error(("cluster", error.key), error.rule) from error
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_context and not config.model.allow_beyond_positions:
        raise source.error(
            ("model", "max_model_len"),
            f"must be between 1 and {spec.max_context} ({format_count(spec.max_context)}), which the positions cover; "
            "three ways out: YaRN (model.rope_scaling with a larger factor), dual chunk attention "
            "(model.dual_chunk_attention), or a shorter document",
        )
    _check_grid(source, config, spec)
    return Deployment(config, spec, shards, wanted or spec.default_context, _load_sampling(source, config))


def fetch_model(path: str | os.PathLike[str], overrides: Mapping[str, object], on_progress: OnProgress) -> None:
    """Download the model of a YAML file where it is named as on a hub and not on this machine. Raises ConfigError."""
    source = ConfigSource(path, overrides)
    _with_model(source, _validate(source), "weights", on_progress)


def _with_model(source: ConfigSource, config: Config, need: Need, on_progress: OnProgress) -> Config:
    """Return the configuration with the path where its model is after a download. Raises ConfigError."""
    text = source.data["model"]["path"]
    need = "tokenizer" if need == "weights" and config.model.load_format == "dummy" else need
    try:
        found = find_model(text, absolute_path(text, _folder(source)), need, on_progress)
    except HubError as error:
        raise source.error(("model", "path"), error.problem) from error
    config = config if found == config.model.path else _validate(source)  # its name too may have changed
    return config.model_copy(update={"model": config.model.model_copy(update={"path": found})})


def _check_grid(source: ConfigSource, config: Config, spec: ModelSpec) -> None:
    """Raise ConfigError unless pages, cells and steps fit: KV is shared by the page, sparse rows come by the cell."""
    page_size, cell, dual = config.kv_cache.page_size, largest_cell(spec), spec.dual_chunk
    if dual is not None and dual.distance % page_size:
        raise source.error(
            ("kv_cache", "page_size"),
            f"must divide {dual.distance}, the distance of DCA chunks (chunk_size {dual.chunk_size} - local_size "
            f"{dual.local_size}); use a smaller page, or another model.dual_chunk_attention",
        )
    if config.kv_store.block_tokens % page_size:
        rule = f"must be a multiple of kv_cache.page_size ({page_size}), here {config.kv_store.block_tokens}"
        raise source.error(("kv_store", "block_tokens"), f"{rule}; use larger blocks, or a smaller page")
    if spec.sparse is not None and spec.sparse.cell % page_size:
        rule = f"must be a multiple of kv_cache.page_size ({page_size}), here {spec.sparse.cell}"
        raise source.error(("sparse", "cell"), f"{rule}; use another cell, or a smaller page")
    if config.prefill.max_num_batched_tokens < cell:
        rule = f"must be at least {cell}, the largest cell of sparse prefill"
        ways_out = "raise it, lower sparse.cell, or say sparse.enabled: false"
        raise source.error(("prefill", "max_num_batched_tokens"), f"{rule}; {ways_out}")


def _load_spec(source: ConfigSource, config: Config) -> ModelSpec:
    """Return the spec of the configured model. Raises ConfigError at the model's file, or at the override at fault."""
    model = config.model
    if not os.path.isdir(model.path) and not (is_gguf(model.path) and os.path.isfile(model.path)):
        absent = f"there is no directory {model.path}; it must hold {model.config_file}"
        absent = f"there is no file {model.path}" if is_gguf(model.path) else absent
        raise source.error(("model", "path"), explain(model.path) if os.path.exists(model.path) else absent)
    overrides = {
        "rope_scaling": model.rope_scaling.as_mapping() if model.rope_scaling else None,
        "dual_chunk": model.dual_chunk_attention.as_mapping() if model.dual_chunk_attention else None,
        "sparse": config.sparse.as_mapping(),
    }

    def load(**chosen: Mapping[str, object] | None) -> ModelSpec:
        return load_model_spec(model.path, config_file=model.config_file, **chosen)

    try:
        return load(**overrides)
    except ModelConfigError as error:
        at_fault: KeyPath = ("model", "path" if model.config_file == "config.json" else "config_file")
        with suppress(ModelConfigError):  # the first step that fails is at fault
            load()
            for name, at_fault in _OVERRIDE_KEYS.items():  # noqa: B007 - of the last step
                load(**{name: overrides[name]})
        raise source.error(at_fault, re.sub(r"^model\.(rope_scaling|dual_chunk): ", "", str(error))) from error


def _load_sampling(source: ConfigSource, config: Config) -> SamplingParams:
    """Return the values of sampling for requests that say nothing. Raises ConfigError."""
    if config.model.sampling_defaults == "greedy":
        return SamplingParams()
    try:
        return sampling_defaults(config.model.path)
    except ModelConfigError as error:
        raise source.error(("model", "sampling_defaults"), str(error)) from error


def _folder(source: ConfigSource) -> Path:
    """Return the folder to which the paths of a file are relative."""
    return Path(os.path.abspath(source.name)).parent


def _validate(source: ConfigSource) -> Config:
    problems = list(source.problems)
    try:
        config = Config.model_validate(source.data, context={"base_dir": _folder(source)})
    except ValidationError as error:
        known = {problem.key for problem in problems}
        broken = [_problem(source, detail) for detail in error.errors(include_url=False)]
        problems += [problem for problem in broken if problem.key not in known]
    if problems:
        raise ConfigError.from_problems(source.name, problems)
    return config


def _problem(source: ConfigSource, detail: ErrorDetails) -> Problem:
    """Return what pydantic found at one key in the words of its field's description."""
    path: KeyPath = tuple(takewhile(lambda part: isinstance(part, str), detail["loc"]))  # not the item of a list
    if detail["type"] == RULE_BETWEEN_KEYS:  # names the key it is about
        return source.problem((*path, *detail["ctx"]["key"].split(".")), detail["ctx"]["rule"])
    key, fields = str(path[-1]), _fields(path[:-1])
    if detail["type"] == "extra_forbidden":
        similar = difflib.get_close_matches(key[:100], fields, n=1)
        hint = f"did you mean '{similar[0]}'?" if similar else f"valid keys: {', '.join(fields)}"
        return source.problem(path, f"unknown key; {hint}")
    rule = rule_of(key, fields[key])
    return source.problem(path, f"required; {rule}" if detail["type"] == "missing" else rule)


def _fields(path: KeyPath) -> Mapping[str, FieldInfo]:
    """Return the fields of the section at `path`."""
    fields = Config.model_fields
    for part in path:
        section: Any = fields[str(part)].annotation
        section, *_ = get_args(section) or (section,)  # X | None
        fields = section.model_fields
    return fields
