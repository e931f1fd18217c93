"""Requests to the engine, written in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.engine.outputs import GenerationSpec
from protos.jobs.sampling import AnswerOptions, SamplingParams

_OF_THE_PROMPT = (
    "priority",
    "resume",
    "question",
    "pinned_len",
    "cache_ttl_s",
    "cache_salt",
    "kernel_family",
    "document_id",
    "prompt_logprobs",
)


def generation_spec(
    prompt: Sequence[int], max_tokens: int, sampling: SamplingParams | None = None, **values: Any
) -> GenerationSpec:
    """Return a spec; `values` are other fields of GenerationSpec and AnswerOptions."""
    own = {name: values.pop(name) for name in _OF_THE_PROMPT if name in values}
    return GenerationSpec(prompt, AnswerOptions(max_tokens, sampling or SamplingParams(), **values), **own)
