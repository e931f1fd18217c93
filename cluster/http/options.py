"""Fields of requests that say how to answer, as OpenAI and vLLM name them, and the options of the job service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError, refuse
from cluster.jobs.model import JobSpec
from protos.jobs import validate
from protos.jobs.limits import MAX_CHARS, MAX_INT32, MAX_INT64, MAX_STOPS, MAX_UINT32
from protos.jobs.sampling import AnswerOptions

MAX_CHOICES = 8  # answers to one prompt


class RequestModel(BaseModel):
    """A part of a request. Fields that nobody knows are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), frozen=True)


class AnswerFields(RequestModel):
    """What requests of all protocols may say about an answer."""

    model: str | None = Field(None, description="The name of the served model, or nothing.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 and -1: all tokens.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = Field(None, description="By token id, -100 to 100; at most 1024 tokens.")
    min_tokens: int | None = None
    thinking_token_budget: int | None = Field(None, description="Reasoning is made to end after so many tokens.")
    thinking_budget: int | None = Field(None, description="The same, as DashScope has it.")
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, description="Lower ones go first, as in vLLM.")
    cache_salt: str | None = Field(None, description="Computed prefixes are shared with requests of the same one only.")
    request_id: str | None = None
    # known to clients, with values that cannot be honoured here, or not by every protocol
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None


# values that mean the same as leaving the field out; all others are refused
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "use_beam_search": (False,), "modalities": (["text"], []),
    "audio": (), "functions": ([],), "function_call": ("none",), "chat_template": (),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "suffix": ("",), "prompt_embeds": (),
    "prompt_logprobs": (0,),
}  # fmt: skip


def check_supported(request: BaseModel) -> None:
    """Refuse fields with values that cannot be honoured (ApiError)."""
    for name in _HARMLESS.keys() & type(request).model_fields.keys():
        value = getattr(request, name)
        if value is not None and value not in _HARMLESS[name]:
            raise refuse(name, f"{validate.show(value)}: is not supported here: leave it out", "unsupported_value")


def num_choices(request: AnswerFields) -> int:
    """Return how many answers a request asks for. Raises InvalidRequest."""
    return validate.check_integer("n", 1 if request.n is None else request.n, 1, MAX_CHOICES)


def choices_of(spec: JobSpec, count: int) -> list[JobSpec]:
    """Return the jobs of several answers to one prompt: a seed that is said is that of the first, and rises by one."""
    seed = spec.ask.sampling.seed
    if seed is None:
        return [spec] * count
    seeds = [(seed + index) & MAX_INT64 for index in range(count)]
    return [replace(spec, ask=replace(spec.ask, sampling=replace(spec.ask.sampling, seed=one))) for one in seeds]


def check_model(backend: Backend, name: str | None) -> None:
    """Refuse the name of another model (ApiError)."""
    if name and name != backend.model:
        problem = f"model: {validate.show(name)}: is not served here, must be {backend.model!r}"
        raise ApiError(404, problem, param="model", code="model_not_found")


def answer_options(
    request: AnswerFields, max_tokens: int | None, logprobs: int | None, enable_thinking: bool | None, default: int
) -> AnswerOptions:
    """Return the options of a request, checked like those of every other client. Raises InvalidRequest.

    Args:
        default: most tokens of an answer whose request says nothing.
    """
    stops = [request.stop] if isinstance(request.stop, str) else [*(request.stop or ())]
    stop_ids = request.stop_token_ids or ()
    for name, values in (("stop", stops), ("stop_token_ids", stop_ids)):
        validate.check_count(name, len(values), MAX_STOPS)
    for stop in stops:
        validate.check_text("stop", stop, MAX_CHARS)
    said: dict[str, Any] = {
        "max_tokens": max_tokens if max_tokens is not None else default,
        "temperature": request.temperature, "top_p": request.top_p, "min_p": request.min_p,
        "top_k": 0 if request.top_k == -1 else request.top_k, "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
        "logit_bias": request.logit_bias, "seed": request.seed, "logprobs": logprobs, "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens, "enable_thinking": enable_thinking, "thinking_budget": _budget(request),
    }  # fmt: skip
    options = {name: validate.check_option(name, value) for name, value in said.items() if value is not None}
    options["stop"] = tuple(filter(None, stops))
    options["stop_token_ids"] = tuple(validate.check_token_ids("stop_token_ids", stop_ids))
    return AnswerOptions.from_values(options)


def _budget(request: AnswerFields) -> int | None:
    """Return how many tokens of reasoning there may be; None: any number. Raises InvalidRequest."""
    for name in ("thinking_token_budget", "thinking_budget"):
        if (value := getattr(request, name)) is not None:
            return validate.check_integer(name, value, 0, MAX_UINT32)
    return None


def job_fields(request: AnswerFields) -> dict[str, Any]:
    """Return what a request says of its job beside input and options. Raises InvalidRequest."""
    labels = {}
    if request.request_id:
        labels["request_id"] = validate.check_text("request_id", request.request_id, MAX_CHARS)
    salt = validate.check_text("cache_salt", request.cache_salt or "", MAX_CHARS)
    priority = validate.check_integer("priority", request.priority or 0, -MAX_INT32, MAX_INT32)
    return {"priority": -priority, "labels": labels, "cache_salt": salt}


def first_set(values: Iterable[Any]) -> Any:
    """Return the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
