"""What is added to the logits of single tokens (`logit_bias`), as requests, jobs and plans carry it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from protos.errors import InvalidRequest
from protos.jobs.limits import MAX_LOGIT_BIAS, MAX_UINT32

_KEY = "logit_bias"
_MAX_BIAS = 100.0


class TokenBias(NamedTuple):
    """`bias` is added to the logit of a token, -100 to 100."""

    token_id: int
    bias: float


def read_logit_bias(value: object) -> tuple[TokenBias, ...]:
    """Return biases by ascending id, of a mapping from ids (JSON has them as text) or of pairs.

    Raises:
        InvalidRequest: too many, an id that is none, or a bias out of range.
    """
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    is_list = isinstance(pairs, Sequence) and not isinstance(pairs, (str, bytes))
    if not isinstance(value, Mapping) and not (is_list and all(isinstance(p, tuple) and len(p) == 2 for p in pairs)):
        raise InvalidRequest(f"{_KEY}: {str(value)[:60]!r}: must be a mapping of token ids to numbers")
    if len(pairs) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"{_KEY}: {len(pairs)}: must be at most {MAX_LOGIT_BIAS}")
    found = {_token_id(token): _bias(bias) for token, bias in pairs}
    return tuple(TokenBias(token, found[token]) for token in sorted(found))


def _token_id(value: object) -> int:
    token = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if type(token) is not int or not 0 <= token <= MAX_UINT32:
        raise InvalidRequest(f"{_KEY}: {str(value)[:60]!r}: must be a token id")
    return token


def _bias(value: object) -> float:
    bias = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not -_MAX_BIAS <= bias <= _MAX_BIAS:  # NaN fails too
        raise InvalidRequest(f"{_KEY}: {str(value)[:60]!r}: must be a number from -{_MAX_BIAS:g} to {_MAX_BIAS:g}")
    return bias
