"""What `generation_config.json` of a checkpoint says about sampling: used where a request says nothing.

Read as vLLM reads it, but that `do_sample: false` makes greedy the default, as in transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from protos.errors import InvalidRequest
from protos.jobs.sampling import OPTIONS, SamplingParams
from protos.model.json_fields import Fields, ModelConfigError, read_json

GENERATION_CONFIG = "generation_config.json"
_MAX_BYTES = 1 << 20
_USED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# what else would change the tokens, and the values that do not
_IGNORED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "top_h": (), "diversity_penalty": (0,), "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],),
    "force_words_ids": ([],), "constraints": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({}, []), "guidance_scale": (1,),
    "exponential_decay_length_penalty": (), "min_length": (0,), "min_new_tokens": (0,), "presence_penalty": (0,),
    "frequency_penalty": (0,),
}  # fmt: skip
_log = logging.getLogger(__name__)


def sampling_defaults(model_dir: Path) -> SamplingParams:
    """Return the values for requests that say nothing; greedy without the file, or when it says nothing of sampling.

    Raises:
        ModelConfigError: the file is malformed, or a value is out of range.
    """
    path = model_dir / GENERATION_CONFIG
    if not path.exists():
        return SamplingParams()
    if path.stat().st_size > _MAX_BYTES:
        raise ModelConfigError(f"{path}: larger than {_MAX_BYTES} bytes: this is not a generation configuration")
    fields = read_json(path)
    values = {name: _number(fields, name) for name in _USED if fields.get(name) is not None}
    if _samples(fields):
        values.setdefault("temperature", 1.0)
    elif fields.get("do_sample") is not None:
        values["temperature"] = 0.0
    _warn_of_ignored(fields)
    return SamplingParams(**values)  # type: ignore[arg-type]


def _samples(fields: Fields) -> bool:
    return fields.get("do_sample") is not None and fields.boolean("do_sample", default=False)


def _number(fields: Fields, name: str) -> float:
    """Return a value in the range of the option of this name; `top_k: -1` is vLLM's way to switch it off."""
    option, value = OPTIONS[name], fields.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option.kind is int and is_number and value == -1:
        return 0
    try:
        if not is_number or (option.kind is int and value != int(value)):  # type: ignore[call-overload]
            raise InvalidRequest("not a number")
        option.check(value)  # type: ignore[arg-type]
    except (InvalidRequest, OverflowError, ValueError):  # the last two: int of an infinity
        low = f"above {option.low:g}" if option.above else f"from {option.low:g}"
        kind = "a whole number" if option.kind is int else "a number"
        requirement = f"must be {kind} {low} to {option.high:g}; correct it, or say model.sampling_defaults: greedy"
        raise fields.error(name, value, requirement) from None
    return option.kind(value)  # type: ignore[no-any-return]


def _warn_of_ignored(fields: Fields) -> None:
    ignored = [
        f"{name} {fields.get(name)!r:.40}"
        for name, neutral in _IGNORED.items()
        if fields.get(name) is not None and fields.get(name) not in neutral
    ]
    if ignored:
        _log.warning("%s: not supported and ignored: %s", fields.source, ", ".join(ignored))
