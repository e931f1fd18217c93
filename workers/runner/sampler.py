"""Choosing tokens from logits. Legend: `V` vocabulary.

The random part is a pure function of (seed, token index): Gumbel noise per vocabulary id, from a counter-based
generator. So a job resumed on another layout, or after a crash, samples the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protos.stage.messages import SampledToken, SampleSpec, SamplingParams, SequenceSlice, TokenBias, TokenLogprob
from workers.kernels.triton.layer import calls


def gumbel_noise(seed: int, token_index: int, size: int) -> torch.Tensor:
    """Return standard Gumbel noise `[size]` in float64, fixed by seed and token index (Philox4x64, key = seed)."""
    bits = np.random.Philox(key=seed, counter=[0, 0, token_index, 0]).random_raw(size)
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, so in (0, 1), never 0 or 1
    return torch.from_numpy(-np.log(-np.log(uniform)))


def filter_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Apply temperature, top-k, top-p and min-p to `[V]` in float64; tokens that are out become -inf.

    Order as in vLLM and transformers: temperature, top-k, top-p, then min-p on what is left.
    """
    wide = logits.double()
    scaled = (wide - wide.max()) / params.temperature  # the best is 0, so no temperature makes it overflow
    if 0 < params.top_k < scaled.numel():
        threshold = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -math.inf)
    if params.top_p < 1.0:
        ordered, ids = scaled.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the more likely tokens
        scaled = scaled.masked_fill(
            torch.zeros_like(scaled, dtype=torch.bool).scatter(0, ids, before >= params.top_p), -math.inf
        )
    if params.min_p > 0.0:
        probabilities = torch.softmax(scaled, dim=-1)
        scaled = scaled.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return scaled


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Apply the repetition penalty to the ids in `seen` (bool `[V]`): divide positive logits, multiply others."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: torch.Tensor, counts: torch.Tensor, presence: float, frequency: float) -> torch.Tensor:
    """Take `presence` from the logits of ids that the answer has, and `frequency` for each time (int32 `[V]`)."""
    return logits - frequency * counts - presence * (counts > 0)


def apply_mask(logits: torch.Tensor, mask: bytes) -> torch.Tensor:
    """Return logits `[V]` of which those without their bit in `mask` are -inf; the lowest bit of a byte is first.

    Raises:
        RuntimeError: the mask is shorter than the vocabulary, or lets nothing through.
    """
    size = logits.numel()
    if 8 * len(mask) < size:
        raise RuntimeError(f"a mask of {len(mask)} bytes for {size} tokens")
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=size, bitorder="little")
    if not bits.any():
        raise RuntimeError("a mask that lets no token through")
    return logits.masked_fill(torch.from_numpy(bits == 0).to(logits.device), -math.inf)


def ban(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return logits `[V]` of which those of `ids` are -inf, unchanged if nothing else could be sampled."""
    inside = torch.tensor([i for i in ids if i < len(logits)], dtype=torch.int64, device=logits.device)
    rest = logits.index_fill(0, inside, -math.inf)
    return rest if bool((rest > -math.inf).any()) else logits


def score(logits: torch.Tensor, part: SequenceSlice, first: int) -> list[SampledToken]:
    """Return targets of a slice with log-probabilities: `first`, and as many after it as there are logits `[n, V]`.

    Raises:
        RuntimeError: the logits are not finite.
    """
    if not _all_finite(logits):
        raise RuntimeError(f"sequence {part.sequence}: logits behind token {part.start + first} are not finite")
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    targets = part.targets[first : first + len(logits)]
    own = logprobs[torch.arange(len(logits)), torch.tensor(list(targets), dtype=torch.int64)].tolist()
    values, ids = logprobs.topk(min(part.top, logits.shape[-1]))
    tops = [tuple(map(TokenLogprob, *row)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        SampledToken(part.sequence, token, logprob, top) for token, logprob, top in zip(targets, own, tops, strict=True)
    ]


def _all_finite(x: torch.Tensor) -> bool:
    """Return whether no value is infinite or NaN. Every step waits for this, so one sum decides if it can."""
    total = float(x.numpy().sum()) if x.device.type == "cpu" else float(x.sum())
    return math.isfinite(total) or bool(torch.isfinite(x).all())  # finite values may add up to infinity


def _highest(x: torch.Tensor) -> int:
    """Return the index of the greatest value, on a CPU the first of equal ones; NumPy wakes no other threads."""
    return int(x.numpy().argmax()) if x.device.type == "cpu" else int(x.argmax())


def _is_argmax(spec: SampleSpec) -> bool:
    """Return whether the token is that of the greatest logit as it is, and nothing else is asked for."""
    params = spec.params
    is_changed = spec.mask or spec.banned or spec.is_biased or params.repetition_penalty != 1.0 or params.counts_tokens
    return params.temperature == 0.0 and params.logprobs is None and spec.forced is None and not is_changed


def _bias_of(bias: Sequence[TokenBias], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = zip(*bias, strict=True)
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(values, device=device)


@dataclass(slots=True)
class _Kept:
    """What is kept of a sequence that is penalised or biased."""

    seen: torch.Tensor | None = None  # bool [V], ids of prompt and answer
    counts: torch.Tensor | None = None  # int32 [V], of the answer
    bias: tuple[torch.Tensor, torch.Tensor] | None = None  # ids, and what is added to their logits


class Sampler:
    """Samples tokens; keeps only the history of penalised sequences and the bias of biased ones."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kept: dict[int, _Kept] = {}

    def forget(self, sequence: int) -> None:
        self._kept.pop(sequence, None)

    def clear(self) -> None:
        self._kept.clear()

    def sample_rows(
        self, logits: torch.Tensor, parts: Sequence[tuple[int, SampleSpec]], chosen: torch.Tensor | None = None
    ) -> tuple[SampledToken, ...]:
        """Choose one token for every sequence of `parts` from its row of `[n, V]`; the contract is that of `sample`.

        Where all are greedy, a device chooses them together, and is waited for once; `chosen` is that choice if it has
        been made (`calls.choose_greedily`).
        """
        if not (calls.supports(logits.device) and all(_is_argmax(spec) for _, spec in parts)):
            return tuple(self.sample(sequence, row, spec) for row, (sequence, spec) in zip(logits, parts, strict=True))
        tokens, finite = (calls.choose_greedily(logits) if chosen is None else chosen).tolist()
        for (sequence, spec), is_finite in zip(parts, finite, strict=True):
            if not is_finite:
                raise RuntimeError(f"sequence {sequence}: logits of token {spec.token_index} are not finite")
        return tuple(SampledToken(sequence, token) for (sequence, _), token in zip(parts, tokens, strict=True))

    def sample(self, sequence: int, logits: torch.Tensor, spec: SampleSpec) -> SampledToken:
        """Choose one token from `[V]` float32 logits, one of the mask if there is one.

        Order as in vLLM: bias, repetition penalty, frequency and presence penalties, mask and banned ids, temperature
        and filters. Its log-probability is that of the logits as they are, without any of them.

        Raises:
            RuntimeError: the logits are not finite, a penalised or biased sequence arrives without its history or bias,
                or the mask lets nothing through.
        """
        params = spec.params
        if not _all_finite(logits):
            raise RuntimeError(f"sequence {sequence}: logits of token {spec.token_index} are not finite")
        kept = self._keep(sequence, spec, logits.device)
        scores = self._adjust(logits, kept, params) if kept is not None else logits
        if spec.mask:
            scores = apply_mask(scores, spec.mask)
        if spec.banned:
            scores = ban(scores, spec.banned)
        if spec.forced is not None:
            token = spec.forced
        elif params.temperature == 0.0:
            token = _highest(scores)
        else:
            filtered = filter_logits(scores, params)
            noise = gumbel_noise(params.seed, spec.token_index, filtered.numel()).to(filtered.device)
            token = _highest(filtered + noise)
        if kept is not None and kept.seen is not None:
            kept.seen[token] = True
        if kept is not None and kept.counts is not None:
            kept.counts[token] += 1
        return self._with_logprobs(sequence, token, logits, params.logprobs)

    def _keep(self, sequence: int, spec: SampleSpec, device: torch.device) -> _Kept | None:
        """Return what is kept of a sequence, made of what its first sample brings; None if nothing is."""
        params = spec.params
        is_penalised = params.repetition_penalty != 1.0
        if not (is_penalised or params.counts_tokens or spec.is_biased):
            return None
        kept = self._kept.setdefault(sequence, _Kept())
        if spec.history:
            kept.seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=device)
            kept.seen[torch.tensor(list(spec.history), dtype=torch.int64, device=device)] = True
        if params.counts_tokens and (spec.outputs or not spec.token_index):
            outputs = torch.tensor(list(spec.outputs), dtype=torch.int64, device=device)
            kept.counts = torch.bincount(outputs, minlength=self._vocab_size).to(torch.int32)
        if spec.bias:
            kept.bias = _bias_of(spec.bias, device)
        for what, is_needed, value in (
            ("repetition but brings no history", is_penalised, kept.seen),
            ("what the answer has but does not bring it", params.counts_tokens, kept.counts),
        ):
            if is_needed and value is None:
                raise RuntimeError(f"sequence {sequence}: the plan penalises {what}")
        if spec.is_biased and kept.bias is None:
            raise RuntimeError(f"sequence {sequence}: the plan has a bias but does not bring it")
        return kept

    @staticmethod
    def _adjust(logits: torch.Tensor, kept: _Kept, params: SamplingParams) -> torch.Tensor:
        scores = logits
        if kept.bias is not None:
            scores = scores.index_add(0, kept.bias[0], kept.bias[1].to(scores.dtype))
        if kept.seen is not None:
            scores = penalise(scores, kept.seen, params.repetition_penalty)
        if kept.counts is not None:
            scores = penalise_counts(scores, kept.counts, params.presence_penalty, params.frequency_penalty)
        return scores

    @staticmethod
    def _with_logprobs(sequence: int, token: int, logits: torch.Tensor, count: int | None) -> SampledToken:
        if count is None:
            return SampledToken(sequence, token)
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        values, ids = logprobs.topk(min(count, logprobs.numel()))
        top = tuple(TokenLogprob(i, p) for i, p in zip(ids.tolist(), values.tolist(), strict=True))
        return SampledToken(sequence, token, float(logprobs[token]), top)
