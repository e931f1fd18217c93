"""Rotary embedding: frequencies equal transformers' bit for bit, angles are right to the last bit of float32."""

from __future__ import annotations

from itertools import product
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, apply_rotary_pos_emb

from protos.model.spec import RopeSpec
from workers.model.rope import Rotary, norm_and_rotate_, rope_frequencies

POSITIONS = (0, 1, 4095, 262_143, 262_144, 1_009_999)
QWEN3_YARN = {"factor": 4.0, "original_max_position_embeddings": 262_144}
LLAMA31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def config_of(theta: float, head_dim: int, kind: str, settings: dict[str, Any]) -> Any:
    rope = {"rope_type": kind, "rope_theta": theta, **settings}
    return AutoConfig.for_model("qwen3_moe", head_dim=head_dim, max_position_embeddings=1 << 21, rope_parameters=rope)


def theirs(theta: float, head_dim: int, kind: str, settings: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = config_of(theta, head_dim, kind, settings)
    if kind == "default":
        return Qwen3MoeRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("linear", {"factor": 1.0}),
    ("linear", {"factor": 3.7}),
    ("yarn", QWEN3_YARN),
    ("yarn", {"factor": 1.0, "original_max_position_embeddings": 4096}),
    ("yarn", {"factor": 3.814697265625, "original_max_position_embeddings": 262_144}),
    ("yarn", {"factor": 256.0, "original_max_position_embeddings": 4096}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 7}),  # both ends of the ramp clipped
    ("yarn", QWEN3_YARN | {"beta_fast": 64.0, "beta_slow": 0.5}),
    ("yarn", QWEN3_YARN | {"beta_fast": 1.0000001, "beta_slow": 1.0, "truncate": False}),
    ("yarn", QWEN3_YARN | {"truncate": False}),
    ("yarn", QWEN3_YARN | {"attention_factor": 1.0}),
    ("yarn", QWEN3_YARN | {"attention_factor": 0.7071}),
    ("yarn", QWEN3_YARN | {"mscale": 1.0}),
    ("yarn", QWEN3_YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}),
    ("yarn", QWEN3_YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}),
    ("llama3", LLAMA31),
    ("llama3", LLAMA31 | {"factor": 32.0, "original_max_position_embeddings": 1 << 20}),
    ("llama3", LLAMA31 | {"low_freq_factor": 0.3, "high_freq_factor": 17.0}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_frequencies_equal_transformers_bit_for_bit(kind: str, settings: dict[str, Any]) -> None:
    for theta, head_dim in product((1e4, 2e5, 1e6, 5e6, 1e7, 1234567.89), (2, 6, 16, 64, 80, 128, 256)):
        expected, expected_factor = theirs(theta, head_dim, kind, dict(settings))
        found, factor = rope_frequencies(RopeSpec(theta, kind, **settings), head_dim)
        assert found.dtype == torch.float32
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), (theta, head_dim)
        assert factor == expected_factor, (theta, head_dim)


@pytest.mark.parametrize(
    "rope", [RopeSpec(1e7), RopeSpec(5e6, "yarn", 4.0, 262_144), RopeSpec(5e5, "llama3", 8.0, 8192)]
)
def test_angles_are_exact_at_a_million(rope: RopeSpec) -> None:
    """Against 50 digits: cos and sin are the float32 next to the true value, or its neighbour."""
    frequencies, factor = rope_frequencies(rope, 128)
    cos, sin = Rotary(rope, 128).cos_sin(torch.tensor(POSITIONS))
    assert cos.dtype == sin.dtype == torch.float32
    with mpmath.workdps(50):
        for row, position in enumerate(POSITIONS):
            for column, frequency in enumerate(frequencies.tolist()):
                angle = mpmath.mpf(frequency) * position
                for got, true in ((cos, mpmath.cos(angle)), (sin, mpmath.sin(angle))):
                    exact = float(true * mpmath.mpf(factor))
                    error = abs(float(got[row, 0, column]) - exact)
                    # one unit in the last place of float32, plus what float64 loses in an angle of a million radians
                    assert error <= 2.0**-23 * abs(exact) + 2.0**-32, (position, column)


def test_float32_angles_would_not_do() -> None:
    """Why angles are float64: the usual float32 ones are off by more than bfloat16's resolution at a million."""
    frequencies, _ = rope_frequencies(RopeSpec(1e7), 128)
    cos, _ = Rotary(RopeSpec(1e7), 128).cos_sin(torch.tensor([POSITIONS[-1]]))
    usual = (torch.tensor([POSITIONS[-1]]).float()[:, None] * frequencies).cos()
    assert float((usual - cos[:, 0]).abs().max()) > 2.0**-8


@pytest.mark.parametrize("length", [1, 2, 17])
def test_rotation_equals_transformers(length: int) -> None:
    config = config_of(1e4, 64, "yarn", {"factor": 4.0, "original_max_position_embeddings": 4096})
    x = torch.randn(length, 3, 64, generator=torch.Generator().manual_seed(4))
    positions = torch.arange(length)
    cos, sin = Qwen3MoeRotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    ours = norm_and_rotate_(x.clone(), Rotary(RopeSpec(1e4, "yarn", 4.0, 4096), 64).cos_sin(positions))
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=0, atol=4e-6)


def test_scores_depend_on_the_distance_only() -> None:
    rotary = Rotary(RopeSpec(1e7), 128)
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 1, 128, generator=generator).unbind(0)
    distance = 4097
    scores = []
    for position in (distance, 262_144, 1_009_999):
        turned_q = norm_and_rotate_(q.clone(), rotary.cos_sin(torch.tensor([position])))
        turned_k = norm_and_rotate_(k.clone(), rotary.cos_sin(torch.tensor([position - distance])))
        scores.append(float((turned_q.double() * turned_k.double()).sum()))
    assert max(scores) - min(scores) < 1e-5
