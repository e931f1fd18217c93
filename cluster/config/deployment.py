"""From one YAML file to a checked deployment.

`load_config` checks the file by itself; `load_deployment` also reads the model's config.json and checks the layout and
the context length against it. Every fault is a ConfigError of one line that names file, line, key and value.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cluster.common.text_format import show_value
from cluster.common.units import format_count
from cluster.config.schema import Config
from cluster.config.topology import LayoutError, plan_shards
from cluster.config.yaml_source import ConfigError, KeyPath, Problem, YamlSource, dotted, read_yaml
from protos.model.config_json import ModelConfigError, load_model_spec
from protos.model.grid import largest_cell
from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec

__all__ = ["Config", "ConfigError", "Deployment", "load_config", "load_deployment"]


@dataclass(frozen=True)
class Deployment:
    """A configuration that fits its model: what the launcher starts. `max_model_len` is in tokens."""

    config: Config
    spec: ModelSpec
    shards: tuple[ShardSpec, ...]
    max_model_len: int


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Config:
    """Read and check one YAML file.

    `overrides` has dotted keys (`{"model.max_model_len": "32k"}`) and is applied over the file before any check;
    paths in it are relative to the file too. Raises ConfigError.
    """
    return _Reading(path, overrides or {}).config()


def load_deployment(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Deployment:
    """Read one YAML file and its model's config.json; check layout, context length and grid. Raises ConfigError."""
    reading = _Reading(path, overrides or {})
    config = reading.config()
    spec = _load_spec(reading, config)
    try:
        shards = plan_shards(spec, config.cluster.pipeline_parallel_size, config.cluster.expert_parallel_size)
    except LayoutError as error:
        reading.fail(("cluster", error.key), error.rule)
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_context and not config.model.allow_beyond_positions:
        reading.fail(
            ("model", "max_model_len"),
            f"must be between 1 and {spec.max_context} ({format_count(spec.max_context)}), which the positions cover; "
            "three ways out: YaRN (model.rope_scaling with a larger factor), dual chunk attention "
            "(model.dual_chunk_attention), or a shorter document",
        )
    _check_grid(reading, config, spec)
    return Deployment(config, spec, shards, wanted or spec.default_context)


def _check_grid(reading: _Reading, config: Config, spec: ModelSpec) -> None:
    """Pages, cells and steps must fit into each other: KV is shared by the page, sparse rows computed by the cell."""
    page_size, cell = config.kv_cache.page_size, largest_cell(spec)
    if spec.dual_chunk is not None and spec.chunk_distance % page_size:
        dual = spec.dual_chunk
        reading.fail(
            ("kv_cache", "page_size"),
            f"must divide {spec.chunk_distance}, the distance of DCA chunks (chunk_size {dual.chunk_size} - local_size "
            f"{dual.local_size}); use a smaller page, or another model.dual_chunk_attention",
        )
    if spec.sparse is not None and spec.sparse.cell % page_size:
        reading.fail(
            ("sparse", "cell"),
            f"must be a multiple of kv_cache.page_size ({page_size}), here {spec.sparse.cell}; use another cell, or a "
            "smaller page",
        )
    if config.prefill.max_num_batched_tokens < cell:
        reading.fail(
            ("prefill", "max_num_batched_tokens"),
            f"must be at least {cell}, the largest cell of sparse prefill; raise it, lower sparse.cell, or say "
            "sparse.enabled: false",
        )


def _load_spec(reading: _Reading, config: Config) -> ModelSpec:
    model = config.model
    if not os.path.isdir(model.path):
        reading.fail(("model", "path"), f"there is no directory {model.path}; it must hold {model.config_file}")
    overrides: dict[str, Mapping[str, Any] | None] = {
        "rope_scaling": model.rope_scaling.as_mapping() if model.rope_scaling else None,
        "dual_chunk": model.dual_chunk_attention.as_mapping() if model.dual_chunk_attention else None,
        "sparse": config.sparse.as_mapping(),
    }
    try:
        return load_model_spec(model.path, config_file=model.config_file, **overrides)
    except ModelConfigError as error:
        key, prefix = _origin_of_fault(model.path, model.config_file, overrides)
        reading.fail(key, str(error).removeprefix(prefix))


def _origin_of_fault(
    model_dir: Path, config_file: str, overrides: Mapping[str, Mapping[str, Any] | None]
) -> tuple[KeyPath, str]:
    """The key that makes loading fail, and how the message names it: the model's file, or one of the overrides."""
    if not _loads(model_dir, config_file):
        return ("model", "path" if config_file == "config.json" else "config_file"), ""
    keys: dict[str, KeyPath] = {"rope_scaling": ("model", "rope_scaling"), "sparse": ("sparse",)}
    guilty = [name for name, value in overrides.items() if value and not _loads(model_dir, config_file, {name: value})]
    name = guilty[0] if guilty else "dual_chunk"  # the only one that is checked against another
    return keys.get(name, ("model", "dual_chunk_attention")), f"model.{name}: "


def _loads(
    model_dir: Path, config_file: str, overrides: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({})
) -> bool:
    try:
        load_model_spec(model_dir, config_file=config_file, **overrides)
    except ModelConfigError:
        return False
    return True


class _Reading:
    """One file with its overrides applied; knows where each value came from."""

    def __init__(self, path: str | os.PathLike[str], overrides: Mapping[str, object]) -> None:
        self.source: YamlSource = read_yaml(path)
        self.overridden: set[KeyPath] = set()
        self.data: dict[str, Any] = self.source.data
        for key, value in overrides.items():
            self._apply(tuple(key.split(".")), value)

    def config(self) -> Config:
        base_dir = Path(os.path.abspath(self.source.name)).parent
        problems = list(self.source.problems)
        try:
            config = Config.model_validate(self.data, context={"base_dir": base_dir})
        except ValidationError as error:
            known = {problem.key for problem in problems}
            found = [self._problem(detail) for detail in error.errors(include_url=False)]
            problems += [problem for problem in found if problem.key not in known]
        if problems:
            raise ConfigError.from_problems(self.source.name, problems)
        return config

    def fail(self, path: KeyPath, rule: str) -> NoReturn:
        """Raise the ConfigError of one key whose value is fine by itself but not with the rest."""
        raise ConfigError.from_problems(self.source.name, [self._at(path, rule)])

    def _apply(self, path: KeyPath, value: object) -> None:
        self.overridden.add(path)
        parent = self.data
        for depth, part in enumerate(path[:-1], start=1):
            child = parent.get(str(part))
            if child is None:
                child = parent[str(part)] = {}
            elif not isinstance(child, dict):
                shown = show_value(child)
                rule = f"cannot be overridden: {dotted(path[:depth])} is {shown}, not a mapping"
                raise ConfigError.from_problems(
                    self.source.name, [Problem(None, dotted(path), show_value(value), rule)]
                )
            parent = child
        parent[str(path[-1])] = _plain(value)

    def _at(self, path: KeyPath, rule: str) -> Problem:
        value: object = self.data
        shown = None
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                shown = "(missing)"
                break
            value = value[part]
        origin = None if self._is_override(path) else self.source.line(path)
        return Problem(origin, dotted(path), shown or show_value(value), rule)

    def _is_override(self, path: KeyPath) -> bool:
        if path not in self.source.lines and any(given[: len(path)] == path for given in self.overridden):
            return True  # a section that only overrides mention
        return any(path[:depth] in self.overridden for depth in range(1, len(path) + 1))

    def _problem(self, detail: Any) -> Problem:
        path: KeyPath = tuple(detail["loc"])
        if detail["type"] == "longreach_rule":  # a rule between keys names the key it is about
            return self._at((*path, *detail["ctx"]["key"].split(".")), detail["ctx"]["rule"])
        if detail["type"] == "extra_forbidden":
            return self._at(path, _unknown_key(str(path[-1]), _fields(path[:-1])))
        field = _fields(path[:-1])[str(path[-1])]
        rule = field.description or "is not allowed"
        return self._at(path, f"required; {rule}" if detail["type"] == "missing" else rule)


def _plain(value: object) -> object:
    """An override as YAML would have given it: mutable mappings, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fields(path: KeyPath) -> Mapping[str, FieldInfo]:
    """The fields of the model at `path`."""
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]  # RopeScaling | None
        model = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return model.model_fields


def _unknown_key(key: str, fields: Mapping[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(key[:100], fields, n=1)
    return f"unknown key; did you mean '{near[0]}'?" if near else f"unknown key; valid keys: {', '.join(fields)}"
