"""Rotations and length scales of dual chunk attention at the constants of the published 1M models."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from protos.model.spec import DualChunkSpec, RopeSpec
from workers.attention.plan import Rotation
from workers.model.rope import CosSin, Rotary, norm_and_rotate_, rope_frequencies, row_scales

DIM = 128
ROPE = RopeSpec(1e7)
PUBLISHED = DualChunkSpec(262144, 8192, 262144)
L = 253952

# absolute position: within the chunk (keys and intra queries), succ queries
ANGLES = {
    0: (0, 253952),
    1: (1, 253953),
    8191: (8191, 262143),
    8192: (8192, 262144),
    8193: (8193, 262144),
    253951: (253951, 262144),  # L - 1
    253952: (0, 253952),  # L
    262143: (8191, 262143),
    262144: (8192, 262144),  # chunk_size
    507903: (253951, 262144),  # 2 L - 1
    507904: (0, 253952),  # 2 L
    1009999: (248143, 262144),
}


def rotation(rope: RopeSpec, positions: list[int], factor: float = 1.0) -> CosSin:
    angles = np.array(positions, np.float64)[:, None] * rope_frequencies(rope, DIM)[0].double().numpy()
    cos, sin = (torch.from_numpy(factor * f(angles)).float()[:, None] for f in (np.cos, np.sin))
    return CosSin(cos, sin)


def check(found: CosSin, wanted: CosSin) -> None:
    torch.testing.assert_close(found.cos, wanted.cos, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.sin, wanted.sin, rtol=0, atol=1e-7)


def test_rotations_of_the_published_constants():
    assert PUBLISHED.distance == L
    found = Rotary(ROPE, DIM, dual_chunk=PUBLISHED).rotations(torch.tensor(list(ANGLES)), list(Rotation))
    check(found[Rotation.INTRA], rotation(ROPE, [intra for intra, _ in ANGLES.values()]))
    check(found[Rotation.SUCC], rotation(ROPE, [succ for _, succ in ANGLES.values()]))
    check(found[Rotation.INTER], rotation(ROPE, [262144] * len(ANGLES)))  # chunk_size, as 2 L - 1 is above it


def test_the_estimate_rotates_without_limits():
    found = Rotary(ROPE, DIM, dual_chunk=PUBLISHED).continuous(torch.tensor(list(ANGLES)))
    check(found[Rotation.INTRA], rotation(ROPE, [intra for intra, _ in ANGLES.values()]))
    check(found[Rotation.SUCC], rotation(ROPE, [intra + L for intra, _ in ANGLES.values()]))
    check(found[Rotation.INTER], rotation(ROPE, [intra + 262144 for intra, _ in ANGLES.values()]))


@pytest.mark.parametrize(("chunk_size", "local_size", "inter"), [(96, 32, 96), (96, 60, 71), (97, 49, 95), (2, 1, 1)])
def test_the_constant_of_early_keys(chunk_size: int, local_size: int, inter: int):
    rotary = Rotary(ROPE, DIM, dual_chunk=DualChunkSpec(chunk_size, local_size))
    found = rotary.rotations(torch.tensor([500, 777]), (Rotation.INTRA, Rotation.INTER))
    assert Rotation.SUCC not in found
    check(found[Rotation.INTER], rotation(ROPE, [inter, inter]))


@pytest.mark.parametrize("dual", [None, PUBLISHED])
def test_plain_attention_and_the_first_chunk_are_the_same(dual: DualChunkSpec | None):
    positions = torch.tensor([0, 1, 63, 64, 253951])
    found = Rotary(ROPE, DIM, dual_chunk=dual).rotations(positions)
    assert list(found) == [Rotation.INTRA]
    check(found[Rotation.INTRA], rotation(ROPE, positions.tolist()))


YARN = RopeSpec(1e7, "yarn", 4.0, 262144)


@pytest.mark.parametrize(("original", "factor"), [(262144, 1.0), (0, 0.1 * math.log(4) + 1)])
def test_yarn_and_dual_chunk_attention_scale_once(original: int, factor: float):
    """YaRN's frequencies always; its factor on cos and sin only where there is no length scale."""
    dual = replace(PUBLISHED, original_max_position_embeddings=original)
    found = Rotary(YARN, DIM, dual_chunk=dual).rotations(torch.tensor(list(ANGLES)), list(Rotation))
    assert not torch.equal(rope_frequencies(YARN, DIM)[0], rope_frequencies(ROPE, DIM)[0])
    check(found[Rotation.INTRA], rotation(YARN, [intra for intra, _ in ANGLES.values()], factor))
    check(found[Rotation.SUCC], rotation(YARN, [succ for _, succ in ANGLES.values()], factor))
    check(found[Rotation.INTER], rotation(YARN, [262144] * len(ANGLES), factor))
    scale = float(row_scales(torch.tensor([1009999]), 1_000_000, DIM, dual)[0])
    stretched = (0.1 * math.log(1_010_000 / 262144) + 1) ** 2
    assert scale == pytest.approx(DIM**-0.5 * (stretched if original else 1.0), rel=1e-6)


@pytest.mark.parametrize("prompt", [1, 262144, 262145, 600_000, 1_000_000])
@pytest.mark.parametrize("original", [0, 262144])
def test_length_scales(prompt: int, original: int):
    dual = replace(PUBLISHED, original_max_position_embeddings=original)
    positions = list(ANGLES)
    found = row_scales(torch.tensor(positions), prompt, DIM, dual)
    assert found.dtype == torch.float32
    for position, scale in zip(positions, found.tolist(), strict=True):
        length = max(prompt, position + 1)
        stretch = max(1.0, 0.1 * math.log(length / original) + 1) if original else 1.0
        assert dual.length_scale(length) == stretch
        assert scale == pytest.approx(DIM**-0.5 * stretch**2, rel=1e-7)
        alone = row_scales(torch.tensor([position]), prompt, DIM, dual)
        assert alone.tolist() == [scale], "alone and among others"


def test_without_dual_chunk_attention_scales_are_constant():
    assert row_scales(torch.tensor([0, 1009999]), 5, DIM, None).tolist() == [float(np.float32(DIM**-0.5))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17, 700])
def test_one_norm_serves_several_rotations(rows: int, dtype: torch.dtype):
    x, weight = torch.randn(rows, 6, 64).to(dtype), torch.rand(6, 64)
    rotations = Rotary(ROPE, 64, dual_chunk=DualChunkSpec(96, 32)).rotations(torch.arange(rows) + 200, list(Rotation))
    wanted = [norm_and_rotate_(x.clone(), one, weight, 1e-6) for one in rotations.values()]
    copies = [(torch.empty(rows, 4, 64, dtype=dtype), one) for one in list(rotations.values())[1:]]
    norm_and_rotate_(x, rotations[Rotation.INTRA], weight, 1e-6, copies)
    assert torch.equal(x, wanted[0])
    assert torch.equal(copies[0][0], wanted[1][:, :4])
    assert torch.equal(copies[1][0], wanted[2][:, :4])
