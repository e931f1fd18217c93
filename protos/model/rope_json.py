"""Rotary settings of `config.json`: `rope_scaling` with `rope_theta`, or `rope_parameters` of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping

from protos.model.json_fields import MAX_POSITIONS, Fields
from protos.model.spec import RopeSpec

# Keys each kind reads; one that the arithmetic would leave out is refused unless it says nothing.
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
_BANDS: Mapping[str, Mapping[str, float | None]] = {  # ends of the blended band, the lower one first; usual values
    "yarn": {"beta_slow": 1.0, "beta_fast": 32.0}, "llama3": {"low_freq_factor": None, "high_freq_factor": None},
}  # fmt: skip
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_SECTIONS = ("mrope_section", "mrope_interleaved")  # axes of images; all positions of text are equal on them
_MROPE = "mrope"  # `default`, as models of images and text spell it
_DEFAULT_THETA = 10_000.0  # of every family in transformers


def rope_spec(config: Fields, positions: int, override: Mapping[str, object] | None) -> RopeSpec:
    """Return the rotary settings of `config.json`, or those of `override`; `positions` is max_position_embeddings.

    Raises ModelConfigError: a value is out of range, or a setting would be left out of the computation.
    """
    stored = _stored(config)
    fields = Fields("model.rope_scaling", override) if override else stored
    kind = _kind(fields)
    theta_from = next((f for f in (fields, stored, config) if f.get("rope_theta") is not None), config)
    theta = theta_from.number("rope_theta", default=_DEFAULT_THETA, above=1.0)
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, _factor(fields))
    original = _original_positions(config, fields, stored, positions)
    factor = _factor(fields, positions / original if kind == "yarn" and original != positions else None)
    band = _BANDS[kind].items()
    (low, lower), (high, upper) = ((key, fields.number(key, default=usual, above=0.0)) for key, usual in band)
    if upper <= lower:
        raise fields.error(high, upper, f"must be above {low} ({lower:g})")
    return RopeSpec(
        theta, kind, factor, original, **{low: lower, high: upper},
        attention_factor=fields.optional_number("attention_factor", above=0.0),
        mscale=fields.optional_number("mscale", at_least=0.0),
        mscale_all_dim=fields.optional_number("mscale_all_dim", at_least=0.0),
        truncate=fields.boolean("truncate", default=True),
    )  # fmt: skip


def refuse_partial_rotary(fields: Fields) -> None:
    """Raise ModelConfigError when only a part of a head is rotated."""
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise fields.error("partial_rotary_factor", fields.get("partial_rotary_factor"), "only 1 is computed")


def _factor(fields: Fields, implied: float | None = None) -> float:
    """Return `factor`, or the one that positions and original positions imply."""
    if fields.get("factor") is None and implied is not None and implied < 1.0:
        raise fields.error("factor", None, "must be given, as original_max_position_embeddings is above the positions")
    return fields.number("factor", default=implied, at_least=1.0, at_most=1e6)


def _original_positions(config: Fields, fields: Fields, stored: Fields, positions: int) -> int:
    """Return the positions of pretraining, as in transformers: top-level key, rope settings, max_position_embeddings.

    An override that leaves out what the replaced settings knew is refused: transformers would take the stretched value.
    """
    key = "original_max_position_embeddings"
    if fields is not stored and fields.get(key) is None and stored.get(key) not in (None, positions):
        raise fields.missing(key, f"must be given, as config.json's own rope settings say {stored.get(key)}")
    own_first = (fields, config) if fields is not stored else (config, fields)
    source = next((f for f in own_first if f.get(key) is not None), fields)
    return source.integer(key, default=positions, high=MAX_POSITIONS)


def _stored(config: Fields) -> Fields:
    """Return the rope settings of `config.json` under either name; empty when there are none."""
    new, old = (
        config.section(key, 'must be an object such as {"rope_type": "yarn", "factor": 4.0}')
        for key in ("rope_parameters", "rope_scaling")
    )
    if new.values and old.values and new.values != old.values:
        raise config.error("rope_scaling", old.values, "differs from rope_parameters; keep one of them")
    return new if new.values else old


def _kind(fields: Fields) -> str:
    old, new = (None if fields.get(key) == _MROPE else fields.get(key) for key in ("type", "rope_type"))
    kind = next((name for name in (new, old) if name is not None), "default")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise fields.error("rope_type", kind, f"must be one of {', '.join(_KEYS)}")
    if old is not None and old != kind:
        raise fields.error("type", old, f"differs from rope_type ({kind}); keep one of them")
    for key, value in fields.values.items():
        if (
            value is not None
            and key not in (*_KEYS[kind], *_COMMON, *_SECTIONS)
            and not _says_nothing(key, value, kind)
        ):
            allowed = ", ".join(("rope_theta", *_KEYS[kind]))
            raise fields.error(key, value, f"not a setting of rope_type {kind}, which takes {allowed}")
    refuse_partial_rotary(fields)
    return kind


def _says_nothing(key: str, value: object, kind: str) -> bool:
    """Return whether a setting of another kind changes nothing: plain frequencies have the factor 1, whatever else."""
    if key in ("factor", "attention_factor"):
        return kind == "default" and not isinstance(value, bool) and value == 1
    if key == "original_max_position_embeddings":
        return kind in ("default", "linear")
    return kind == "default" and any(key in keys for keys in _KEYS.values())
