"""The starting weights: a circuit that follows a question's key to its value, in otherwise small random weights.

Layer 0 copies to every position what stood 1, 2, 3 and ASSIGNED_BACK tokens back. Layer 1 copies the most recent key
(the word behind a hyphen, and the one before it) to what follows it: in a hidden sentence and in a question alike.
Layer 2 attends to where key and last two tokens agree, and reads the token there. Other heads continue repeated tokens.
Everything is trained afterwards.

Channels of the hidden state: 0 constant, 1 .. M/2-1 the token, then four times RANK for what layer 0 copied, then
twice RANK for the key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.training.init import (
    CIRCUIT_NORM,
    HEADS,
    KV_HEADS,
    attention_of,
    clear,
    look_back,
    orthonormal,
    slow_pairs,
    small_random,
)
from workers.training.model import Attention, NeedleModel, Shape, rope_frequencies

RANK_SHARE = 12  # hidden size over the channels of one copied token
KEY_SHARE, NEAR_SHARE = 0.6, 0.4  # of a score: being a key, and being near
NEAR_RADIANS = (0.02, 0.11)  # a token; pairs that say how near
ASSIGNED_BACK = 17  # tokens from the end of the line `VAR ABCDE = VAR FGHIJ` to its A: the variable handed on to
TOKEN_GAIN = 2.0  # of what is read of a token itself, as strong as what was copied from the one before


def initialise(model: NeedleModel, seed: int, hyphen: int) -> None:
    """Set every weight of `model` in place, from `seed` and the id of the token `-`. ValueError if it does not fit."""
    shape = model.shape
    slow = slow_pairs(shape)
    rank = shape.hidden // RANK_SHARE
    if (shape.heads, shape.kv_heads) != (HEADS, KV_HEADS) or shape.layers < 3:
        raise ValueError(
            f"config.json: {shape.heads} heads, {shape.kv_heads} KV heads, {shape.layers} layers;"
            f" the starting circuit needs {HEADS}, {KV_HEADS} and at least 3 layers"
        )
    if not 2 <= len(slow) <= rank or 2 * rank > shape.head_dim:
        raise ValueError(
            f"config.json: hidden_size={shape.hidden}, head_dim={shape.head_dim}, rope_theta={shape.rope_theta:g} leave"
            f" {len(slow)} slow pairs; the starting circuit needs 2 to {rank}, and head_dim of at least {2 * rank}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        small_random(model, generator)
        reader = orthonormal(rank, shape.hidden // 2 - 1, generator)
        look_back(attention_of(model, 0), shape, reader, (1, 2, 3, ASSIGNED_BACK))
        circuit = _Circuit(shape, slow, reader, generator)
        circuit.copy_key(attention_of(model, 1), model.embed_tokens.weight[hyphen])
        circuit.read_value(attention_of(model, 2))


class _Circuit:
    """Layers 1 and 2; their key-value head 1 continues repeated pairs of tokens."""

    def __init__(self, shape: Shape, slow: Tensor, reader: Tensor, generator: torch.Generator) -> None:
        self.shape, self.slow, self.reader, self.generator = shape, slow, reader, generator
        self.rank, self.half = reader.shape[0], shape.hidden // 2
        self.key_at = self.half + 4 * self.rank
        self.values = orthonormal(shape.head_dim, self.half - 1, generator)

    def copy_key(self, attention: Attention, hyphen: Tensor) -> None:
        """Let heads 0 and 1 attend to the nearest token behind a hyphen and write it and the one before the hyphen."""
        shape, dim, half, rank = self.shape, self.shape.head_dim, self.half, self.rank
        self._begin(attention)
        rows = torch.cat((self.slow, self.slow + dim // 2))
        mix = orthonormal(rank, len(rows), self.generator).T  # [2 x slow, rank] keeps lengths
        attention.k_proj.weight[rows, half : half + rank] = mix
        frequencies = rope_frequencies(shape)
        near = ((frequencies > NEAR_RADIANS[0]) & (frequencies < NEAR_RADIANS[1])).nonzero().flatten()
        wanted = mix @ self.reader @ hyphen[1:half]
        # What layer 0 wrote is 0.12 x 18 times the token; the constant is hidden[0].
        copied = 0.12 * 18 * wanted.norm() / hyphen[0]
        weight = float(copied) * (NEAR_SHARE / KEY_SHARE) ** 0.5 / len(near) ** 0.5
        attention.k_proj.weight[near, 0] = weight
        direction = wanted / wanted.norm() * copied
        for head in (0, 1):
            attention.q_proj.weight[rows + head * dim, 0] = direction
            attention.q_proj.weight[near + head * dim, 0] = weight
            start = self.key_at
            attention.o_proj.weight[torch.arange(rank) + start, torch.arange(rank) + head * dim] = 0.1
            attention.o_proj.weight[torch.arange(rank) + start + rank, torch.arange(rank) + head * dim + rank] = 0.05
        attention.v_proj.weight[:rank, 1:half] = self.reader
        attention.v_proj.weight[torch.arange(rank) + rank, torch.arange(rank) + half + rank] = 1.0
        self._continue_pairs(attention, 0.02)

    def read_value(self, attention: Attention) -> None:
        """Let heads 0 and 1 attend where the key and the last two tokens agree, and write the token there."""
        dim, half, rank, slow = self.shape.head_dim, self.half, self.rank, self.slow
        self._begin(attention)
        key = orthonormal(len(slow), 2 * rank, self.generator)
        last, before = (orthonormal(len(slow), rank, self.generator) for _ in range(2))
        first, second = slow, slow + dim // 2

        attention.k_proj.weight[first, self.key_at : self.key_at + 2 * rank] = key
        attention.k_proj.weight[second, half : half + rank] = 0.8 * last
        attention.k_proj.weight[second, half + rank : half + 2 * rank] = 0.4 * before
        for head in (0, 1):
            row = head * dim
            attention.q_proj.weight[first + row, self.key_at : self.key_at + 2 * rank] = key
            attention.q_proj.weight[second + row, 1:half] = 0.8 * TOKEN_GAIN * last @ self.reader
            attention.q_proj.weight[second + row, half : half + rank] = 0.4 * before
            attention.o_proj.weight[1:half, row : row + dim] = self.values.T * 0.15
        attention.v_proj.weight[:dim, 1:half] = self.values
        self._continue_pairs(attention, 0.15)

    def _begin(self, attention: Attention) -> None:
        clear(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        attention.q_norm.weight.fill_(CIRCUIT_NORM)
        attention.k_norm.weight.fill_(CIRCUIT_NORM)

    def _continue_pairs(self, attention: Attention, gain: float) -> None:
        """Let KV head 1, heads 2 and 3, attend behind the last two tokens' earlier places, and write it."""
        dim, half, rank, slow = self.shape.head_dim, self.half, self.rank, self.slow
        last, before = (orthonormal(len(slow), rank, self.generator) for _ in range(2))
        first, second = slow, slow + dim // 2
        attention.k_proj.weight[first + dim, half : half + rank] = last
        attention.k_proj.weight[second + dim, half + rank : half + 2 * rank] = before
        for head in (2, 3):
            row = head * dim
            attention.q_proj.weight[first + row, 1:half] = TOKEN_GAIN * last @ self.reader
            attention.q_proj.weight[second + row, half : half + rank] = before
            attention.o_proj.weight[1:half, row : row + dim] = self.values.T * gain
        attention.v_proj.weight[dim : 2 * dim, 1:half] = self.values
