"""The outside oracle: transformers, eager attention and eager experts, on the same checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)

TOLERANCE = 1e-4  # of max|diff| / max|logit|, per row, in float32
_CLEAR = 2e-5  # a smaller gap between the best two tokens could go either way by rounding alone


@dataclass(frozen=True)
class Reference:
    """Greedy tokens, and the float32 logits `[n, V]` each was chosen from."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


class Oracle:
    """A checkpoint inside transformers.

    Args:
        rope: replaces the rope settings of config.json (spelling of transformers 5, with `rope_theta`).
    """

    def __init__(
        self, model_dir: Path, dtype: torch.dtype = torch.float32, rope: Mapping[str, Any] | None = None
    ) -> None:
        config = AutoConfig.from_pretrained(model_dir)
        if rope is not None:
            config.rope_parameters = dict(rope)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        self.model = auto.from_pretrained(
            model_dir, config=config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self._begin()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Oracle:
        """Return an oracle of a model that is in memory."""
        oracle = cls.__new__(cls)
        oracle.model = model
        oracle._begin()
        return oracle

    def _begin(self) -> None:
        assert self.model.config._attn_implementation == "eager"
        self._known: dict[tuple[tuple[int, ...], int], Reference] = {}

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], last: int, piece: int = 1024) -> torch.Tensor:
        """Logits `[last, V]` after each of the last tokens, in float32; at most `piece` rows of scores in memory."""
        cache, kept = DynamicCache(config=self.model.config), []
        for start in range(0, len(tokens), piece):
            ids = torch.tensor([tokens[start : start + piece]])
            keep = max(0, start + ids.shape[1] - max(start, len(tokens) - last))
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep or 1)
            kept.append(out.logits[0, -keep:] if keep else out.logits[0, :0])
        return torch.cat(kept).float()

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> Reference:
        """`count` greedy tokens from a loop with transformers' own cache; remembered per prompt."""
        key = (tuple(prompt), count)
        if key not in self._known:
            self._known[key] = self._greedy(prompt, count)
        return self._known[key]

    def _greedy(self, prompt: Sequence[int], count: int) -> Reference:
        cache, tokens, done = DynamicCache(config=self.model.config), list(prompt), 0
        rows: list[torch.Tensor] = []
        while len(rows) < count:
            ids = torch.tensor([tokens[done : done + 1024]])
            done += ids.shape[1]
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if done == len(tokens):
                rows.append(out.logits[0, -1].float())
                tokens.append(int(rows[-1].argmax()))
        reference = Reference(tuple(tokens[len(prompt) :]), torch.stack(rows))
        assert is_clear(reference), "two best tokens lie too close: choose another prompt, this one proves nothing"
        return reference


def is_clear(reference: Reference) -> bool:
    """Whether no token of it could have come out otherwise by rounding alone."""
    best = reference.logits.topk(2, dim=-1).values
    return float(((best[:, 0] - best[:, 1]) / reference.logits.abs().amax(dim=-1)).min()) > _CLEAR


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """`max|diff| / max|logit|` of each row of `[n, V]`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours.double() - theirs.double()).abs().amax(dim=-1) / theirs.double().abs().amax(dim=-1)


def random_prompt(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (length,), generator=generator).tolist()
