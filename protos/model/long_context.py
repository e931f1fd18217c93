"""Long contexts as `config.json` and the YAML say: dual chunk attention, and sparse prefill.

Both live in `dual_chunk_attention_config` of published models; the patterns of heads may lie beside it in a file of
their own. The YAML goes before the files, key by key; `cluster.config.attention` has the ranges of its values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos.model.json_fields import MAX_POSITIONS, MAX_SIZE, Fields, ModelConfigError, read_json_value
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec

SECTION = "dual_chunk_attention_config"
ADAPTIVE_RECALL_FLOOR = 0.90  # held-out recall that budgets without a published pattern must reach
_DUAL_CHUNK_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
_SPARSE_FILE_KEYS = (
    "sparse_attention_enabled", "sparse_attention_threshold", "sparse_attention_last_q", "sparse_attention_config",
)  # fmt: skip
_PATTERN = "vertical_and_slash"
_PATTERNS_KEY = "sparse_attention_config"
_PATTERNS_FILE = "sparse_attention_config.json"
_MAX_HEADS = 1 << 18  # of all layers; a model of 235B parameters has 6,016
_PUBLISHED_30 = 130  # what the published code makes of a budget of 30 columns


def dual_chunk_spec(config: Fields, override: Mapping[str, object] | None, plain: ModelSpec) -> DualChunkSpec | None:
    """Return the dual chunk attention of a model, None for plain attention.

    Args:
        config: the whole `config.json`.
        override: `enabled` and fields of `DualChunkSpec`; what is missing or null comes from the file.
        plain: the model without it.

    Raises ModelConfigError: a value of the file is out of range or its key unknown, or the two do not fit together.
    """
    stored, yaml = _section(config), Fields("model.dual_chunk", override or {})
    sources = {key: yaml if yaml.get(key) is not None else stored for key in _DUAL_CHUNK_KEYS}
    named = any(source.get(key) is not None for key, source in sources.items())
    if not (named if yaml.get("enabled") is None else yaml.boolean("enabled", default=named)):
        return None
    chunk = sources["chunk_size"].integer("chunk_size", low=2, high=MAX_POSITIONS)
    if chunk > plain.max_context:
        requirement = f"must be at most {plain.max_context}, which the positions cover"
        raise sources["chunk_size"].error("chunk_size", chunk, requirement)
    local = sources["local_size"].integer("local_size", high=chunk - 1)
    # without it there is no length scale, as in the published code
    key = "original_max_position_embeddings"
    return DualChunkSpec(chunk, local, sources[key].integer(key, default=0, low=0, high=MAX_POSITIONS))


def sparse_spec(
    config: Fields, override: Mapping[str, object] | None, plain: ModelSpec, model_dir: Path
) -> SparseSpec | None:  # fmt: skip
    """Return the sparse prefill of a model, None when every row is dense.

    Without `sparse_attention_enabled` in the file it is on when patterns are published, as in the published code.

    Args:
        config: the whole `config.json`; its sparse settings are used with or without dual chunk attention.
        override: `enabled`, fields of `SparseSpec` and of `HeadBudget` within their ranges; what is missing or null
            comes from the file. `n_vertical` with `n_slash` gives every head the same budget, `target_recall` asks for
            adaptive budgets; both set the published patterns aside.
        plain: the model without it.
        model_dir: where patterns may lie in `sparse_attention_config.json`.

    Raises ModelConfigError: a value of a file is out of range, or its key is not known.
    """
    stored, usual = _section(config), SparseSpec()
    yaml: dict[str, Any] = {key: value for key, value in (override or {}).items() if value is not None}
    published = stored.boolean("sparse_attention_enabled", default=bool(stored.values))
    threshold = stored.integer("sparse_attention_threshold", default=usual.threshold, low=0, high=MAX_POSITIONS)
    last_q = stored.integer("sparse_attention_last_q", default=usual.last_q)
    if not yaml.get("enabled", published):
        return None
    patterns = _patterns(stored, plain, model_dir / _PATTERNS_FILE)
    if not yaml.pop("enabled", patterns is not None or "sparse_attention_enabled" in stored.values):
        return None
    uniform = HeadBudget(yaml.pop("n_vertical"), yaml.pop("n_slash")) if "n_vertical" in yaml else None
    if uniform is not None or "target_recall" in yaml:
        patterns = None
    is_settled = patterns is not None or uniform is not None or yaml.get("synthetic")
    floor = 0.0 if is_settled else ADAPTIVE_RECALL_FLOOR
    values = {"threshold": threshold, "last_q": last_q, "recall_floor": floor} | yaml
    return SparseSpec(patterns=patterns, uniform=uniform, **values)


def _section(config: Fields) -> Fields:
    section = config.section(SECTION, f"must be an object with {', '.join(_DUAL_CHUNK_KEYS)}")
    known = (*_DUAL_CHUNK_KEYS, *_SPARSE_FILE_KEYS)
    for key, setting in section.values.items():
        if key not in known:
            raise section.error(key, setting, f"not a setting that is computed; known are {', '.join(known)}")
    return section


def _patterns(stored: Fields, plain: ModelSpec, file: Path) -> tuple[tuple[HeadBudget | None, ...], ...] | None:
    """Return the published budgets of all heads; those of the file go before those in `config.json`."""
    if os.path.lexists(file) and (value := read_json_value(file)):
        try:
            return _of_layers(Fields(str(file), {}), "patterns", value, plain)
        except ModelConfigError as error:
            raise ModelConfigError(f"{error}; move the file away, or say sparse.enabled: false") from error
    value = stored.get(_PATTERNS_KEY)
    return None if value is None else _of_layers(stored, _PATTERNS_KEY, value, plain)


def _of_layers(source: Fields, key: str, value: object, plain: ModelSpec) -> tuple[tuple[HeadBudget | None, ...], ...]:
    layers, heads = plain.num_hidden_layers, plain.num_attention_heads
    if not isinstance(value, list) or len(value) != layers:
        problem = f"has {len(value)}" if isinstance(value, list) else "is no list"
        raise source.error(key, value, f"must be a list of {layers} objects, one a layer; {problem}")
    if layers * heads > _MAX_HEADS:
        raise source.error(key, value, f"patterns of {layers * heads} heads: at most {_MAX_HEADS} are read")
    return tuple(_layer(source, f"{key}[{layer}]", heads, entries) for layer, entries in enumerate(value))


def _layer(source: Fields, name: str, heads: int, entries: object) -> tuple[HeadBudget | None, ...]:
    if not isinstance(entries, dict):
        raise source.error(name, entries, f"must be an object of heads from 0 to {heads - 1}")
    budgets: list[HeadBudget | None] = [None] * heads
    known = {str(head): head for head in range(heads)}
    for head, entry in entries.items():
        if head not in known:
            raise source.error(name, head, f"must be a head from 0 to {heads - 1}")
        budgets[known[head]] = _budget(source, f"{name}[{head}]", entry)
    return tuple(budgets)


def _budget(source: Fields, name: str, entry: object) -> HeadBudget:
    match entry:
        case [str(kind), int(vertical), int(slash), *rest] if kind == _PATTERN and len(rest) <= 1:
            if type(vertical) is type(slash) is int and 1 <= min(vertical, slash) <= max(vertical, slash) <= MAX_SIZE:
                return HeadBudget(_PUBLISHED_30 if vertical == 30 else vertical, slash)
    requirement = f'must be ["{_PATTERN}", columns, offsets, score] with whole numbers from 1 to {MAX_SIZE}'
    raise source.error(name, entry, requirement)
