"""Reads what `config.json` and the YAML say of long contexts: dual chunk attention, and sparse prefill.

Both live in `dual_chunk_attention_config` of published models. The YAML goes before the file, key by key.
"""

from __future__ import annotations

from collections.abc import Mapping

from protos.model.json_fields import MAX_SIZE, Fields
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec

SECTION = "dual_chunk_attention_config"
ADAPTIVE_RECALL_FLOOR = 0.90  # held-out recall that budgets without a published pattern must reach
_MAX_POSITIONS = 1 << 30
_DUAL_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
_SPARSE_FILE_KEYS = (
    "sparse_attention_enabled", "sparse_attention_threshold", "sparse_attention_last_q", "sparse_attention_config",
)  # fmt: skip
_SPARSE_KEYS = (
    "enabled", "threshold", "last_q", "cell", "n_vertical", "n_slash", "target_recall", "recall_floor",
    "max_dense_share", "synthetic",
)  # fmt: skip
_PATTERN = "vertical_and_slash"
_PUBLISHED_30 = 130  # what the published code makes of a budget of 30 columns


def dual_chunk_spec(config: Fields, override: Mapping[str, object] | None, plain: ModelSpec) -> DualChunkSpec | None:
    """Dual chunk attention of a model; None: plain attention.

    Args:
        config: the whole `config.json`.
        override: `enabled`, `chunk_size`, `local_size`, `original_max_position_embeddings`; what is missing or null
            comes from the file. `enabled: false` switches it off.
        plain: the model without it.

    Raises:
        ModelConfigError: a value is out of range, or a key is not known: it could change the output.
    """
    stored = _section(config)
    given = _override("model.dual_chunk", override, ("enabled", *_DUAL_KEYS))
    named = any(fields.get(key) is not None for fields in (stored, given) for key in _DUAL_KEYS)
    if not given.boolean("enabled", default=named):
        return None
    size_from, local_from, original_from = (given if given.get(key) is not None else stored for key in _DUAL_KEYS)
    chunk = size_from.integer("chunk_size", low=2, high=_MAX_POSITIONS)
    if chunk > plain.max_context:
        raise size_from.error("chunk_size", chunk, f"must be at most {plain.max_context}, which the positions cover")
    local = local_from.integer("local_size", high=chunk - 1)
    # without it there is no length scale, as in the published code
    original = original_from.integer("original_max_position_embeddings", default=0, low=0, high=_MAX_POSITIONS)
    return DualChunkSpec(chunk, local, original)


def sparse_spec(config: Fields, override: Mapping[str, object] | None, plain: ModelSpec) -> SparseSpec | None:
    """Sparse prefill of a model; None: every row is dense.

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
    given = _override("model.sparse", override, _SPARSE_KEYS)
    published = stored.boolean("sparse_attention_enabled", default=False)
    threshold = stored.integer("sparse_attention_threshold", default=usual.threshold, low=0, high=_MAX_POSITIONS)
    last_q = stored.integer("sparse_attention_last_q", default=usual.last_q, high=MAX_SIZE)
    patterns = _patterns(stored, plain)
    if not given.boolean("enabled", default=published):
        return None
    uniform = _uniform(given)
    adaptive = given.get("target_recall") is not None
    if uniform is not None or adaptive:
        patterns = None
    synthetic = given.boolean("synthetic", default=False)
    settled = patterns is not None or uniform is not None or synthetic
    return SparseSpec(
        threshold=given.integer("threshold", default=threshold, low=0, high=_MAX_POSITIONS),
        last_q=given.integer("last_q", default=last_q, high=MAX_SIZE),
        cell=given.integer("cell", default=usual.cell, high=MAX_SIZE),
        patterns=patterns,
        uniform=uniform,
        target_recall=given.number("target_recall", default=usual.target_recall, above=0.0, at_most=1.0),
        recall_floor=given.number(
            "recall_floor", default=0.0 if settled else ADAPTIVE_RECALL_FLOOR, at_least=0.0, at_most=1.0
        ),
        max_dense_share=given.number("max_dense_share", default=usual.max_dense_share, at_least=0.0, at_most=1.0),
        synthetic=synthetic,
    )


def _section(config: Fields) -> Fields:
    value = config.get(SECTION)
    if value is not None and not isinstance(value, dict):
        raise config.error(SECTION, value, f"must be an object with {', '.join(_DUAL_KEYS)}")
    section = Fields(f"{config.source}: {SECTION}", value or {})
    _refuse_unknown(section, (*_DUAL_KEYS, *_SPARSE_FILE_KEYS))
    return section


def _override(source: str, values: Mapping[str, object] | None, known: tuple[str, ...]) -> Fields:
    given = Fields(source, {key: value for key, value in (values or {}).items() if value is not None})
    _refuse_unknown(given, known)
    return given


def _refuse_unknown(fields: Fields, known: tuple[str, ...]) -> None:
    for key, value in fields.values.items():
        if key not in known:
            raise fields.error(key, value, f"not a setting that is computed; known are {', '.join(known)}")


def _uniform(given: Fields) -> HeadBudget | None:
    numbers = [key for key in ("n_vertical", "n_slash") if given.get(key) is not None]
    if not numbers:
        return None
    if given.get("target_recall") is not None:
        raise given.error("target_recall", given.get("target_recall"), "goes without n_vertical and n_slash")
    return HeadBudget(given.integer("n_vertical"), given.integer("n_slash"))


def _patterns(stored: Fields, plain: ModelSpec) -> tuple[tuple[HeadBudget | None, ...], ...] | None:
    key, value = "sparse_attention_config", stored.get("sparse_attention_config")
    if value is None:
        return None
    layers, heads = plain.num_hidden_layers, plain.num_attention_heads
    if not isinstance(value, list) or len(value) != layers:
        found = f"has {len(value)}" if isinstance(value, list) else "is no list"
        raise stored.error(key, value, f"must be a list of {layers} objects, one a layer; {found}")
    return tuple(_layer(stored, layer, heads, entries) for layer, entries in enumerate(value))


def _layer(stored: Fields, layer: int, heads: int, entries: object) -> tuple[HeadBudget | None, ...]:
    name = f"sparse_attention_config[{layer}]"
    if not isinstance(entries, dict):
        raise stored.error(name, entries, f"must be an object of heads from 0 to {heads - 1}")
    found: list[HeadBudget | None] = [None] * heads
    for head, entry in entries.items():
        if head not in map(str, range(heads)):
            raise stored.error(name, head, f"must be a head from 0 to {heads - 1}")
        found[int(head)] = _budget(stored, f"{name}[{head}]", entry)
    return tuple(found)


def _budget(stored: Fields, name: str, entry: object) -> HeadBudget:
    requirement = f'must be ["{_PATTERN}", columns, offsets, score] with whole numbers from 1 to {MAX_SIZE}'
    if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[0] != _PATTERN:
        raise stored.error(name, entry, requirement)
    if not all(type(number) is int and 1 <= number <= MAX_SIZE for number in entry[1:3]):
        raise stored.error(name, entry, requirement)
    vertical, slash = entry[1:3]
    return HeadBudget(_PUBLISHED_30 if vertical == 30 else vertical, slash)
