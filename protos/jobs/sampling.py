"""How to answer: every option of generation, declared once with type, default, range and meaning.

The fields of `Sampling` in jobs.proto, the keyword arguments of the clients and the options of the command line have
these names; whatever passes them on goes through `OPTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from protos.errors import InvalidRequest
from protos.jobs.limits import MAX_INT64, MAX_LOGPROBS


def _option(default: Any, meaning: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Any:
    """Declare an option of the range from `low` to `high`; `above`: without `low` itself."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "above": above})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is chosen. `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` switch those filters off.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    temperature: float = _option(0.0, "0 is greedy.", 0.0, 100.0)
    top_k: int = _option(0, "Keep the K likeliest tokens (0: all).", 0, 1 << 30)
    top_p: float = _option(1.0, "Keep the likeliest tokens up to this mass.", 0.0, 1.0, above=True)
    min_p: float = _option(0.0, "Drop tokens below this share of the likeliest.", 0.0, 1.0)
    repetition_penalty: float = _option(1.0, "Above 1 discourages repetition.", 0.01, 100.0)
    seed: int = _option(0, "Same seed, same samples.", 0, MAX_INT64)
    logprobs: int | None = _option(None, "Report log-probabilities of the K best tokens.", 0, MAX_LOGPROBS)

    def __post_init__(self) -> None:
        for option in _SAMPLING:
            option.check(getattr(self, option.name))


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Generation options shared by all questions of one call.

    Raises:
        InvalidRequest: a value is out of its range, or a stop string is empty.
    """

    max_tokens: int = _option(256, "Most tokens of an answer.", 1)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = _option((), "End the answer at this text (repeatable).")
    stop_token_ids: tuple[int, ...] = _option((), "End the answer at this id (repeatable).")
    ignore_eos: bool = _option(False, "Do not stop at the model's end token.")
    enable_thinking: bool | None = _option(None, "enable_thinking for the chat template.")

    def __post_init__(self) -> None:
        OPTIONS["max_tokens"].check(self.max_tokens)
        if not all(self.stop):
            raise InvalidRequest('stop: "": a stop string must have at least one character')

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> AnswerOptions:
        """Return the options given by name, those of sampling among them; what is absent keeps its default."""
        sampling = {option.name: values[option.name] for option in _SAMPLING if option.name in values}
        rest = {name: value for name, value in values.items() if name not in sampling}
        return cls(sampling=SamplingParams(**sampling), **rest)


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of one option; `kind` is the type of its value, or of an element when it `is_list`."""

    name: str
    kind: type
    is_list: bool
    default: Any
    meaning: str
    low: float
    high: float
    above: bool  # `low` itself is out of range

    def check(self, value: float | None) -> None:
        """Refuse a number out of range (raises InvalidRequest). None, as the default of some, is in range."""
        if value is None:
            return
        if not self.low <= value <= self.high:  # NaN fails too
            bounds = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
            raise InvalidRequest(f"{self.name}: {value}: must be {bounds}")
        if self.above and value == self.low:
            raise InvalidRequest(f"{self.name}: {value:g}: must be above {self.low:g} and at most {self.high:g}")


def _declared(declaring: type[Any]) -> list[Option]:
    """Return the options that a dataclass and the dataclasses in it declare, in their order."""
    options: list[Option] = []
    hints = get_type_hints(declaring)
    for item in fields(declaring):
        if not item.metadata:
            options += _declared(hints[item.name])
            continue
        kinds = [part for part in get_args(hints[item.name]) if part not in (type(None), ...)] or [hints[item.name]]
        options.append(Option(item.name, kinds[0], isinstance(item.default, tuple), item.default, **item.metadata))
    return options


_SAMPLING = _declared(SamplingParams)
OPTIONS = {option.name: option for option in _declared(AnswerOptions)}
