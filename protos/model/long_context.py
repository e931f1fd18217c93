"""Long contexts as `config.json` and the YAML say: dual chunk attention, and sparse prefill.

Both live in `dual_chunk_attention_config` of published models. The YAML goes before the file, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from protos.model.json_fields import MAX_POSITIONS, MAX_SIZE, Fields
from protos.model.spec import DUAL_CHUNK_SETTINGS, SPARSE_SETTINGS, DualChunkSpec, HeadBudget, ModelSpec, SparseSpec

SECTION = "dual_chunk_attention_config"
ADAPTIVE_RECALL_FLOOR = 0.90  # held-out recall that budgets without a published pattern must reach
_SPARSE_FILE_KEYS = (
    "sparse_attention_enabled", "sparse_attention_threshold", "sparse_attention_last_q", "sparse_attention_config",
)  # fmt: skip
_PATTERN = "vertical_and_slash"
_PUBLISHED_30 = 130  # what the published code makes of a budget of 30 columns


def dual_chunk_spec(config: Fields, override: Mapping[str, object] | None, plain: ModelSpec) -> DualChunkSpec | None:
    """Return the dual chunk attention of a model, None for plain attention.

    Args:
        config: the whole `config.json`.
        override: `enabled` and fields of `DualChunkSpec`; what is missing or null comes from the file.
            `enabled: false` switches it off.
        plain: the model without it.

    Raises:
        ModelConfigError: a value is out of range, or a key is not known: it could change the output.
    """
    stored = _section(config)
    yaml = _override("model.dual_chunk", override, DUAL_CHUNK_SETTINGS)
    named = any(source.get(key) is not None for source in (stored, yaml) for key in DUAL_CHUNK_SETTINGS)
    if not yaml.boolean("enabled", default=named):
        return None
    origin = {key: yaml if yaml.get(key) is not None else stored for key in DUAL_CHUNK_SETTINGS}
    chunk = _read(origin["chunk_size"], DUAL_CHUNK_SETTINGS["chunk_size"])
    if chunk > plain.max_context:
        requirement = f"must be at most {plain.max_context}, which the positions cover"
        raise origin["chunk_size"].error("chunk_size", chunk, requirement)
    local = origin["local_size"].integer("local_size", high=chunk - 1)
    # without it there is no length scale, as in the published code
    key = "original_max_position_embeddings"
    return DualChunkSpec(chunk, local, _read(origin[key], DUAL_CHUNK_SETTINGS[key]))


def sparse_spec(config: Fields, override: Mapping[str, object] | None, plain: ModelSpec) -> SparseSpec | None:
    """Return the sparse prefill of a model, None when every row is dense.

    Args:
        config: the whole `config.json`; its sparse settings are used with or without dual chunk attention.
        override: `enabled` and fields of `SparseSpec`; what is missing or null comes from the file.
            `n_vertical` with `n_slash` gives every head the same budget, `target_recall` asks for adaptive budgets;
            both set the published patterns aside.
        plain: the model without it.

    Raises:
        ModelConfigError: a value is out of range, or a key is not known.
    """
    stored, usual = _section(config), SparseSpec()
    yaml = _override("model.sparse", override, SPARSE_SETTINGS)
    published = stored.boolean("sparse_attention_enabled", default=False)
    threshold = stored.integer("sparse_attention_threshold", default=usual.threshold, low=0, high=MAX_POSITIONS)
    last_q = stored.integer("sparse_attention_last_q", default=usual.last_q, high=MAX_SIZE)
    patterns = _patterns(stored, plain)
    if not yaml.boolean("enabled", default=published):
        return None
    uniform = _uniform(yaml)
    if uniform is not None or yaml.get("target_recall") is not None:
        patterns = None
    synthetic = yaml.boolean("synthetic", default=False)
    is_settled = patterns is not None or uniform is not None or synthetic
    defaults = {
        "threshold": threshold, "last_q": last_q, "recall_floor": 0.0 if is_settled else ADAPTIVE_RECALL_FLOOR,
    }  # fmt: skip
    ranged = [setting for setting in fields(SparseSpec) if setting.metadata]
    values = {setting.name: _read(yaml, setting, defaults.get(setting.name)) for setting in ranged}
    return SparseSpec(patterns=patterns, uniform=uniform, synthetic=synthetic, **values)


def _read(source: Fields, setting: Field[Any], default: float | None = None) -> Any:
    """Return a number within the range of its setting; `default`, else that of the setting, stands for null."""
    if default is None and isinstance(setting.default, (int, float)):
        default = setting.default
    bounds = setting.metadata
    if setting.type == "int":
        return source.integer(setting.name, default=default, low=bounds["ge"], high=bounds["le"])  # type: ignore[arg-type]
    above, at_least = bounds.get("gt", -math.inf), bounds.get("ge", -math.inf)
    return source.number(setting.name, default=default, above=above, at_least=at_least, at_most=bounds["le"])


def _section(config: Fields) -> Fields:
    value = config.get(SECTION)
    if value is not None and not isinstance(value, dict):
        raise config.error(SECTION, value, f"must be an object with {', '.join(DUAL_CHUNK_SETTINGS)}")
    section = Fields(f"{config.source}: {SECTION}", value or {})
    _refuse_unknown(section, (*DUAL_CHUNK_SETTINGS, *_SPARSE_FILE_KEYS))
    return section


def _override(source: str, values: Mapping[str, object] | None, settings: Iterable[str]) -> Fields:
    yaml = Fields(source, {key: value for key, value in (values or {}).items() if value is not None})
    _refuse_unknown(yaml, ("enabled", *settings))
    return yaml


def _refuse_unknown(fields: Fields, known: tuple[str, ...]) -> None:
    for key, value in fields.values.items():
        if key not in known:
            raise fields.error(key, value, f"not a setting that is computed; known are {', '.join(known)}")


def _uniform(yaml: Fields) -> HeadBudget | None:
    if all(yaml.get(setting.name) is None for setting in fields(HeadBudget)):
        return None
    if yaml.get("target_recall") is not None:
        raise yaml.error("target_recall", yaml.get("target_recall"), "goes without n_vertical and n_slash")
    return HeadBudget(*(_read(yaml, setting) for setting in fields(HeadBudget)))


def _patterns(stored: Fields, plain: ModelSpec) -> tuple[tuple[HeadBudget | None, ...], ...] | None:
    key, value = "sparse_attention_config", stored.get("sparse_attention_config")
    if value is None:
        return None
    layers, heads = plain.num_hidden_layers, plain.num_attention_heads
    if not isinstance(value, list) or len(value) != layers:
        problem = f"has {len(value)}" if isinstance(value, list) else "is no list"
        raise stored.error(key, value, f"must be a list of {layers} objects, one a layer; {problem}")
    return tuple(_layer(stored, layer, heads, entries) for layer, entries in enumerate(value))


def _layer(stored: Fields, layer: int, heads: int, entries: object) -> tuple[HeadBudget | None, ...]:
    name = f"sparse_attention_config[{layer}]"
    if not isinstance(entries, dict):
        raise stored.error(name, entries, f"must be an object of heads from 0 to {heads - 1}")
    budgets: list[HeadBudget | None] = [None] * heads
    for head, entry in entries.items():
        if head not in map(str, range(heads)):
            raise stored.error(name, head, f"must be a head from 0 to {heads - 1}")
        budgets[int(head)] = _budget(stored, f"{name}[{head}]", entry)
    return tuple(budgets)


def _budget(stored: Fields, name: str, entry: object) -> HeadBudget:
    requirement = f'must be ["{_PATTERN}", columns, offsets, score] with whole numbers from 1 to {MAX_SIZE}'
    if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[0] != _PATTERN:
        raise stored.error(name, entry, requirement)
    if not all(type(number) is int and 1 <= number <= MAX_SIZE for number in entry[1:3]):
        raise stored.error(name, entry, requirement)
    vertical, slash = entry[1:3]
    return HeadBudget(_PUBLISHED_30 if vertical == 30 else vertical, slash)
