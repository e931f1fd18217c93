"""The starting weights: a circuit that matches a question to its needle, in otherwise small random weights.

Layer 0 copies to every position what stood 1, 2, 3 and 4 tokens back. Layer 1 then matches two words at once: KV head 0
lets the row before a code find the needle with the same adjective and noun; KV head 1 continues a repeated pair of
tokens, which copies the rest of an answer. Everything is trained afterwards. From a plain random start the matching
does not form in the time of the recipe.

Channels of the hidden state: 0 constant, 1 .. half-1 the token, half + r*h .. half + r*(h+1) what stood h+1 back,
with half = M/2 and r = M/8 (hidden 256: 128 and 32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workers.training.model import Attention, NeedleModel, Shape, rope_frequencies

HEADS, KV_HEADS = 4, 2  # the circuit is drawn for exactly these
SMALL = 0.02  # standard deviation of weights that hold nothing yet
CIRCUIT_NORM = 2.0  # query and key norm weights of layers 0 and 1: sharper softmax
SLOW_RADIANS = 1.5  # a pair carries content, not position, if it turns less than this over the native window
NATIVE_WINDOW = 4096


def initialise(model: NeedleModel, seed: int) -> None:
    """Set every weight of `model` in place, from `seed` alone. ValueError if the circuit does not fit its sizes."""
    shape = model.shape
    slow = slow_pairs(shape)
    rank = shape.hidden // 8
    if (shape.heads, shape.kv_heads) != (HEADS, KV_HEADS) or shape.layers < 2:
        raise ValueError(
            f"config.json: {shape.heads} heads, {shape.kv_heads} KV heads, {shape.layers} layers;"
            f" the starting circuit needs {HEADS}, {KV_HEADS} and at least 2 layers"
        )
    if len(slow) < 2 or len(slow) > rank or rank > shape.head_dim or 2 * shape.head_dim > shape.hidden:
        raise ValueError(
            f"config.json: hidden_size={shape.hidden}, head_dim={shape.head_dim}, rope_theta={shape.rope_theta:g} leave"
            f" {len(slow)} slow pairs; the starting circuit needs 2 to hidden_size/8, hidden_size/8 <= head_dim"
            " <= hidden_size/2; keep the shipped config.json"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        small_random(model, generator)
        token_reader = orthonormal(rank, shape.hidden // 2 - 1, generator)
        look_back(attention_of(model, 0), shape, token_reader)
        _match(attention_of(model, 1), shape, slow, token_reader, generator)


def small_random(model: NeedleModel, generator: torch.Generator) -> None:
    """Set all weights small and random, norms to 1, and the embeddings to their channels: constant, token, the rest."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, SMALL, generator=generator)
        if name.endswith("down_proj"):
            parameter.mul_(0.1)
    _embeddings(model.embed_tokens.weight, generator)


def attention_of(model: NeedleModel, layer: int) -> Attention:
    """Return the attention of a layer."""
    attention = model.layers[layer].self_attn
    assert isinstance(attention, Attention)
    return attention


def slow_pairs(shape: Shape) -> Tensor:
    """Return the rotary pairs that turn so slowly that they carry content over the native window."""
    return (rope_frequencies(shape) * NATIVE_WINDOW < SLOW_RADIANS).nonzero().flatten()


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix [rows, columns], rows <= columns, with orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T.contiguous()


def _embeddings(weight: Tensor, generator: torch.Generator) -> None:
    half = weight.shape[1] // 2
    weight.normal_(0.0, 0.01, generator=generator)
    weight[:, 1:half].normal_(0.0, 0.07, generator=generator)
    weight[:, 0] = 0.4


def clear(*matrices: nn.Linear) -> None:
    """Set matrices to zero."""
    for matrix in matrices:
        matrix.weight.zero_()


def look_back(attention: Attention, shape: Shape, token_reader: Tensor, back: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Let head h attend `back[h]` tokens back and write the token it reads there to its own channels."""
    pairs, rank, half = shape.head_dim // 2, token_reader.shape[0], shape.hidden // 2
    frequencies = rope_frequencies(shape)
    envelope = torch.exp(-torch.arange(pairs) / 8)
    clear(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    attention.q_norm.weight.fill_(CIRCUIT_NORM)
    attention.k_norm.weight.fill_(CIRCUIT_NORM)
    for head in range(shape.kv_heads):
        row = head * shape.head_dim
        attention.k_proj.weight[row : row + pairs, 0] = envelope
        attention.v_proj.weight[row : row + rank, 1:half] = token_reader
    for head in range(shape.heads):
        row = head * shape.head_dim
        # Turned back by so many positions, so that the score peaks at the key that far behind.
        attention.q_proj.weight[row : row + pairs, 0] = envelope * torch.cos(frequencies * back[head])
        attention.q_proj.weight[row + pairs : row + 2 * pairs, 0] = -envelope * torch.sin(frequencies * back[head])
        channels = torch.arange(rank) + half + rank * head
        attention.o_proj.weight[channels, torch.arange(rank) + row] = 0.12


def _match(attention: Attention, shape: Shape, slow: Tensor, token_reader: Tensor, generator: torch.Generator) -> None:
    """Let KV head 0 match noun and adjective of question and needle, and KV head 1 the last two tokens."""
    dim, half, rank = shape.head_dim, shape.hidden // 2, token_reader.shape[0]
    first, second = slow, slow + dim // 2
    read_a, read_b = orthonormal(len(slow), rank, generator), orthonormal(len(slow), rank, generator)
    values = orthonormal(dim, half - 1, generator)
    clear(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    attention.q_norm.weight.fill_(CIRCUIT_NORM)
    attention.k_norm.weight.fill_(CIRCUIT_NORM)

    def read(matrix: nn.Linear, rows: Tensor, back: int, content: Tensor) -> None:
        start = half + rank * (back - 1)
        matrix.weight[rows, start : start + rank] = content

    # In a needle the code's first digit has its noun 3 back and its adjective 4 back; in an answer the row before the
    # code has them 2 and 3 back.
    read(attention.k_proj, first, 3, read_a)
    read(attention.k_proj, second, 4, read_b)
    read(attention.k_proj, first + dim, 1, read_a)
    read(attention.k_proj, second + dim, 2, read_b)
    for head in range(shape.heads):
        row = head * dim
        if head < shape.heads // 2:
            read(attention.q_proj, first + row, 2, read_a)
            read(attention.q_proj, second + row, 3, read_b)
        else:
            attention.q_proj.weight[first + row, 1:half] = 0.8 * read_a @ token_reader
            read(attention.q_proj, second + row, 1, read_b)
        attention.o_proj.weight[1:half, row : row + dim] = values.T * (0.15 if head < shape.heads // 2 else 0.08)
    for head in range(shape.kv_heads):
        attention.v_proj.weight[head * dim : (head + 1) * dim, 1:half] = values
