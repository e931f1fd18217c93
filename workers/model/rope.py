"""Rotary position embedding: plain, YaRN, linear and llama3 frequencies; angles in float64.

Frequencies and attention factor are computed in the same float32 steps as transformers' `modeling_rope_utils`, so they
are equal bit for bit. Source of YaRN: arXiv 2309.00071. Legend: `T` tokens, `H` heads, `D` head dim.
"""

from __future__ import annotations

import math

import torch

from protos.model_spec import RopeSpec
from workers.model.layers import inverse_rms, row_blocks


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[D / 2]` in float32 and the factor on cos and sin.

    Raises:
        ValueError: the kind is unknown.
    """
    dims = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    if rope.kind in ("default", "linear", "llama3"):
        inv_freq = 1.0 / (rope.theta ** (dims / head_dim))
        if rope.kind == "linear":
            inv_freq = inv_freq / rope.factor
        elif rope.kind == "llama3":
            inv_freq = _llama3(rope, inv_freq)
        return inv_freq, 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim), _yarn_attention_factor(rope)
    raise ValueError(f"rope_type: {rope.kind!r}: must be one of default, yarn, linear, llama3")


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return float(temperature(rope.mscale) / temperature(rope.mscale_all_dim))
    return temperature(1)


def _yarn(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """NTK-by-parts: high frequencies stay, low ones are divided by the factor, a linear ramp between."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    powers = rope.theta ** (torch.arange(0, head_dim, 2).to(torch.float) / head_dim)
    return (1.0 / (rope.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    original = rope.original_max_position_embeddings
    low_wavelen, high_wavelen = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_wavelen, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelen - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    medium = ~(wavelen < high_wavelen) * ~(wavelen > low_wavelen)
    return torch.where(medium, smoothed, scaled)


class Rotary:
    """Turns positions into cos and sin, and applies them in the half-split ("neox") layout."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device | str = "cpu") -> None:
        inv_freq, self.attention_factor = rope_frequencies(rope, head_dim)
        self._inv_freq = inv_freq.to(torch.float64).to(device)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[T, 1, D / 2]` in float32 for positions `[T]`; angles are float64, rounded once at the end."""
        angles = positions.to(torch.float64)[:, None] * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.float()[:, None], sin.float()[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[T, H, D]` by cos and sin `[T, 1, D / 2]`; computed in float32, returned in the type of `x`."""
    return norm_and_rotate_(x.clone(), cos, sin)


def norm_and_rotate_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """Root mean square norm of every head (when `weight` is given), then rotation, in place and rounded once.

    Args:
        x: `[T, H, D]`, a view will do; overwritten and returned.
        cos, sin: `[T, 1, D / 2]` float32.
        weight: `[H, D]` float32, or None for models without query and key norms.
    """
    half = x.shape[-1] // 2
    for rows in row_blocks(x):
        wide = x[rows].float()
        if weight is not None:
            wide = (wide * inverse_rms(wide, eps)).mul_(weight)
        turned = wide * torch.cat([cos[rows], cos[rows]], dim=-1)
        turned[..., :half].addcmul_(wide[..., half:], sin[rows], value=-1)
        turned[..., half:].addcmul_(wide[..., :half], sin[rows])
        x[rows] = turned
    return x
