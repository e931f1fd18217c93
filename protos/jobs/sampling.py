"""How to answer: every option of generation, declared once with type, default, range and meaning.

The fields of `Sampling` in jobs.proto, the keyword arguments of the clients and the options of the command line have
these names; whatever passes them on goes through `OPTIONS`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from protos.errors import InvalidRequest
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_INT64, MAX_LOGPROBS
from protos.jobs.logit_bias import TokenBias, read_logit_bias


def _option(default: Any, meaning: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Any:
    """Declare an option of the range from `low` to `high`; `above`: without `low` itself."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "above": above})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, as far as the caller says: None leaves it to the model (`model.sampling_defaults`).

    Raises:
        InvalidRequest: a value is out of its range.
    """

    temperature: float | None = _option(
        None, "0 is greedy; default, as of the next four: what the model's files say.", 0.0, 100.0
    )
    top_k: int | None = _option(None, "Keep the K likeliest tokens (0: all).", 0, 1 << 30)
    top_p: float | None = _option(None, "Keep the likeliest tokens up to this mass.", 0.0, 1.0, above=True)
    min_p: float | None = _option(None, "Drop tokens below this share of the likeliest.", 0.0, 1.0)
    repetition_penalty: float | None = _option(None, "Above 1 discourages repetition.", 0.01, 100.0)
    seed: int | None = _option(None, "Same seed, same samples; default: a fresh one.", 0, MAX_INT64)
    logprobs: int | None = _option(None, "Report log-probabilities of the K best tokens.", 0, MAX_LOGPROBS)
    presence_penalty: float | None = _option(None, "Above 0 discourages tokens that the answer has.", -2.0, 2.0)
    frequency_penalty: float | None = _option(None, "The same, for each time that it has them.", -2.0, 2.0)

    def __post_init__(self) -> None:
        for option in _SAMPLING:
            option.check(getattr(self, option.name))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is chosen, with every value of `Sampling` said; here the defaults are greedy.

    `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` switch those filters off. The repetition penalty is
    about prompt and answer, the other two about the answer alone.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for option in _SAMPLING:
            option.check(getattr(self, option.name))

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often an answer has a token."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the values that decide about tokens, by name."""
        return {option.name: getattr(self, option.name) for option in _SAMPLING if option.name != "logprobs"}


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Generation options shared by all questions of one call.

    Raises:
        InvalidRequest: a value is out of its range, a stop string is empty, or `min_tokens` are more than `max_tokens`.
    """

    max_tokens: int = _option(256, "Most tokens of an answer.", 1)
    sampling: Sampling | SamplingParams = field(default_factory=Sampling)
    stop: tuple[str, ...] = _option((), "End the answer at this text (repeatable).")
    stop_token_ids: tuple[int, ...] = _option((), "End the answer at this id (repeatable).")
    ignore_eos: bool = _option(False, "Do not stop at the model's end token.")
    enable_thinking: bool | None = _option(None, "enable_thinking for the chat template.")
    structured_outputs: Constraint | None = _option(  # noqa: RUF009
        None, "Answer with JSON that matches the schema in this file."
    )
    thinking_budget: int | None = _option(None, "Most tokens of reasoning before it is made to end.", 0)
    min_tokens: int = _option(0, "Fewest tokens of an answer.", 0)
    logit_bias: tuple[TokenBias, ...] = _option((), "Add BIAS, -100 to 100, to the logit of a token (repeatable).")

    def __post_init__(self) -> None:
        if isinstance(self.sampling, SamplingParams):  # every value is said
            object.__setattr__(self, "sampling", Sampling(*astuple(self.sampling)))
        if self.structured_outputs is not None:  # a mapping as vLLM has it will do
            object.__setattr__(self, "structured_outputs", Constraint.from_value(self.structured_outputs))
        object.__setattr__(self, "logit_bias", read_logit_bias(self.logit_bias))
        for name in ("max_tokens", "min_tokens", "thinking_budget"):
            OPTIONS[name].check(getattr(self, name))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens: {self.min_tokens}: must be at most max_tokens, {self.max_tokens}")
        if not all(self.stop):
            raise InvalidRequest('stop: "": a stop string must have at least one character')

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> AnswerOptions:
        """Return the options given by name, those of sampling among them; what is absent keeps its default."""
        sampling = {option.name: values[option.name] for option in _SAMPLING if option.name in values}
        rest = {name: value for name, value in values.items() if name not in sampling}
        return cls(sampling=Sampling(**sampling), **rest)

    def resolve(self, defaults: SamplingParams, seed: int | None = None) -> AnswerOptions:
        """Return the options with every value of sampling said.

        Args:
            defaults: of values that are not said, but for the seed.
            seed: if it is not said; None: a fresh one.
        """
        said = {option.name: getattr(self.sampling, option.name) for option in _SAMPLING}
        said = {name: value for name, value in said.items() if value is not None}
        seed = secrets.randbits(63) if seed is None else seed
        return replace(self, sampling=replace(defaults, **{"seed": seed} | said))

    def shortened(self, max_tokens: int) -> AnswerOptions:
        """Return the options of an answer with at most so many tokens."""
        most = min(self.max_tokens, max_tokens)
        return replace(self, max_tokens=most, min_tokens=min(self.min_tokens, most))

    @property
    def sampling_params(self) -> SamplingParams:
        """The values of sampling after `resolve`."""
        values = {option.name: getattr(self.sampling, option.name) for option in _SAMPLING}
        assert all(value is not None for name, value in values.items() if name != "logprobs"), "resolve them first"
        return SamplingParams(**values)


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
        if item.name == "sampling":
            options += _declared(Sampling)
            continue
        kinds = [part for part in get_args(hints[item.name]) if part not in (type(None), ...)] or [hints[item.name]]
        options.append(Option(item.name, kinds[0], isinstance(item.default, tuple), item.default, **item.metadata))
    return options


_SAMPLING = _declared(Sampling)
OPTIONS = {option.name: option for option in _declared(AnswerOptions)}
