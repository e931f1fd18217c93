"""Rotary position embedding: plain, YaRN, linear and llama3 frequencies, and the rotations of dual chunk attention.

Frequencies and attention factor are computed in the same float32 steps as in transformers' `modeling_rope_utils` and
equal these bit for bit; angles are float64. Source of YaRN: arXiv 2309.00071.

Legend: `T` tokens, `H` heads, `D` head dim, `L` tokens between the starts of two DCA chunks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from protos.model.spec import DualChunkSpec, RopeSpec
from workers.attention.plan import Rotation
from workers.kernels.blocking import row_blocks
from workers.model import compiled
from workers.model.layers import inverse_rms


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Return the inverse frequencies `[D / 2]` in float32 and the factor on cos and sin.

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
    """Return NTK-by-parts frequencies: high ones unchanged, low ones divided by the factor, a linear ramp between."""

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


class CosSin(NamedTuple):
    """cos and sin `[T, 1, D / 2]` in float32: one rotation of every row."""

    cos: torch.Tensor
    sin: torch.Tensor


Rotations = dict[Rotation, CosSin]  # of the rows of a step, for the regions whose keys they meet; keys take INTRA


class Rotary:
    """Computes the rotations of positions: one for plain attention, up to three for dual chunk attention.

    Under DCA (arXiv 2402.17463) keys and `intra` queries rotate by the position within their chunk, `succ` queries (for
    keys of the chunk before) by that plus `L` but at most `chunk_size`, `inter` queries (for all earlier keys) by a
    constant. DCA's length scale, where it is set, replaces YaRN's factor on cos and sin.
    """

    def __init__(
        self, rope: RopeSpec, head_dim: int, device: torch.device | str = "cpu", dual_chunk: DualChunkSpec | None = None
    ) -> None:
        inv_freq, factor = rope_frequencies(rope, head_dim)
        scaled = dual_chunk is not None and dual_chunk.original_max_position_embeddings > 0
        self.attention_factor = 1.0 if scaled else factor
        self._dual = dual_chunk
        self._inv_freq = inv_freq.to(torch.float64).to(device)

    def cos_sin(self, positions: torch.Tensor) -> CosSin:
        """Compute the rotation by `positions` `[T]`; angles are float64, rounded once at the end."""
        angles = positions.to(torch.float64)[:, None] * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return CosSin(cos.float()[:, None], sin.float()[:, None])

    def rotations(self, positions: torch.Tensor, regions: Collection[Rotation] = (Rotation.INTRA,)) -> Rotations:
        """Compute the rotations at `positions` `[T]` for keys of `regions`, which include INTRA."""
        if self._dual is None:
            return {Rotation.INTRA: self.cos_sin(positions)}
        dual, within = self._dual, positions % self._dual.distance
        rotations = {Rotation.INTRA: self.cos_sin(within)}
        if Rotation.SUCC in regions:
            rotations[Rotation.SUCC] = self.cos_sin((within + dual.distance).clamp(max=dual.chunk_size))
        if Rotation.INTER in regions:
            constant = self.cos_sin(positions.new_full((1,), min(2 * dual.distance - 1, dual.chunk_size)))
            rotations[Rotation.INTER] = CosSin(*(table.expand(len(positions), -1, -1) for table in constant))
        return rotations

    def continuous(self, positions: torch.Tensor) -> Rotations:
        """Compute the rotations of the sparse estimate, without the limits, so that distances stay in order."""
        assert self._dual is not None, "plain attention has one rotation"
        within = positions % self._dual.distance
        shifts = {Rotation.INTRA: 0, Rotation.SUCC: self._dual.distance, Rotation.INTER: self._dual.chunk_size}
        return {rotation: self.cos_sin(within + shift) for rotation, shift in shifts.items()}


def row_scales(
    positions: torch.Tensor, length: int | torch.Tensor, head_dim: int, dual_chunk: DualChunkSpec | None
) -> torch.Tensor:
    """Return the logit factors of rows at `positions` `[T]`, float32: `D ** -0.5`, times DCA's length scale squared.

    `length` is that of the prompt, or `[T]` those of the prompts of the rows; rows after it are scaled by their own
    position. So the factor depends on prompt length and position only, and a token that is computed again gets the same
    one.
    """
    original = dual_chunk.original_max_position_embeddings if dual_chunk else 0
    base = head_dim**-0.5
    if original <= 0:
        return torch.full((len(positions),), base, dtype=torch.float32)
    seen = (positions + 1).clamp(min=length).to(torch.float64)
    stretch = (0.1 * torch.log(seen / original) + 1.0).clamp(min=1.0)
    return (base * stretch.square()).float()


def norm_and_rotate_(
    x: torch.Tensor, cos_sin: CosSin, weight: torch.Tensor | None = None, eps: float = 0.0,
    copies: Sequence[tuple[torch.Tensor, CosSin]] = (),
) -> torch.Tensor:  # fmt: skip
    """Normalise every head (RMS, when `weight` is given), then rotate it, in place and rounded once.

    Args:
        x: `[T, H, D]`, possibly a view; overwritten and returned.
        cos_sin: the rotation of `x`.
        weight: `[H, D]` float32, or None for models without query and key norms.
        copies: other tensors `[T, n, D]` that receive the first `n` heads under another rotation.
    """
    if compiled.supports_norm_rotate(x):
        for copy, other in copies:
            heads = copy.shape[1]
            compiled.norm_rotate(x[:, :heads], *other, None if weight is None else weight[:heads], eps, copy)
        return compiled.norm_rotate(x, *cos_sin, weight, eps, x)
    for rows in row_blocks(x):
        wide = x[rows].float()
        if weight is not None:
            wide = (wide * inverse_rms(wide, eps)).mul_(weight)
        for copy, other in copies:
            copy[rows] = _rotated(wide[:, : copy.shape[1]], other, rows)
        x[rows] = _rotated(wide, cos_sin, rows)
    return x


def _rotated(wide: torch.Tensor, cos_sin: CosSin, rows: slice) -> torch.Tensor:
    cos, sin = cos_sin.cos[rows], cos_sin.sin[rows]
    half = wide.shape[-1] // 2
    out = wide * torch.cat([cos, cos], dim=-1)
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out
