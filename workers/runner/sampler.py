"""Choosing tokens from logits. Legend: `V` vocabulary.

The random part is a pure function of (seed, token index): Gumbel noise per vocabulary id, from a counter-based
generator. So a job resumed on another layout, or after a crash, samples the same tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from protos.stage.messages import SampledToken, SampleSpec, SamplingParams, TokenLogprob


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


def _all_finite(x: torch.Tensor) -> bool:
    """Return whether no value is infinite or NaN. Every step waits for this, so one sum decides if it can."""
    total = float(x.numpy().sum()) if x.device.type == "cpu" else float(x.sum())
    return math.isfinite(total) or bool(torch.isfinite(x).all())  # finite values may add up to infinity


def _highest(x: torch.Tensor) -> int:
    """Return the index of the greatest value, on a CPU the first of equal ones; NumPy wakes no other threads."""
    return int(x.numpy().argmax()) if x.device.type == "cpu" else int(x.argmax())


class Sampler:
    """Samples tokens; keeps only which ids a penalised sequence has seen."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seen: dict[int, torch.Tensor] = {}

    def forget(self, sequence: int) -> None:
        self._seen.pop(sequence, None)

    def clear(self) -> None:
        self._seen.clear()

    def sample(self, sequence: int, logits: torch.Tensor, spec: SampleSpec) -> SampledToken:
        """Choose one token from `[V]` float32 logits, one of the mask if there is one.

        Its log-probability is that of the logits as they are: without penalty, mask, temperature and filters.

        Raises:
            RuntimeError: the logits are not finite, a penalised sequence arrives without its history, or the mask lets
                nothing through.
        """
        params = spec.params
        if not _all_finite(logits):
            raise RuntimeError(f"sequence {sequence}: logits of token {spec.token_index} are not finite")
        scores = logits
        if params.repetition_penalty != 1.0:
            scores = penalise(logits, self._seen_mask(sequence, spec, logits.device), params.repetition_penalty)
        if spec.mask:
            scores = apply_mask(scores, spec.mask)
        if params.temperature == 0.0:
            token = _highest(scores)
        else:
            filtered = filter_logits(scores, params)
            noise = gumbel_noise(params.seed, spec.token_index, filtered.numel()).to(filtered.device)
            token = _highest(filtered + noise)
        if params.repetition_penalty != 1.0:
            self._seen[sequence][token] = True
        return self._with_logprobs(sequence, token, logits, params.logprobs)

    def _seen_mask(self, sequence: int, spec: SampleSpec, device: torch.device) -> torch.Tensor:
        if spec.history:
            mask = torch.zeros(self._vocab_size, dtype=torch.bool, device=device)
            mask[torch.tensor(list(spec.history), dtype=torch.int64, device=device)] = True
            self._seen[sequence] = mask
        if sequence not in self._seen:
            raise RuntimeError(f"sequence {sequence}: the plan penalises repetition but brings no history")
        return self._seen[sequence]

    @staticmethod
    def _with_logprobs(sequence: int, token: int, logits: torch.Tensor, count: int | None) -> SampledToken:
        if count is None:
            return SampledToken(sequence, token)
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        values, ids = logprobs.topk(min(count, logprobs.numel()))
        top = tuple(TokenLogprob(i, p) for i, p in zip(ids.tolist(), values.tolist(), strict=True))
        return SampledToken(sequence, token, float(logprobs[token]), top)
