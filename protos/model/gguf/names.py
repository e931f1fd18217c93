"""Where a GGUF file keeps the tensors of a model: its names, shapes and stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from protos.model.files import AGAIN
from protos.model.gguf.config import ROPE_FACTORS
from protos.model.gguf.file import GgufFile, GgufTensor
from protos.model.tensor_names import EMBEDDING, LM_HEAD

_ENDS = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", LM_HEAD: "output.weight"}
_IN_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_TURNED = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")


class Place(NamedTuple):
    """A tensor of a file, or one expert of a stack."""

    tensor: GgufTensor
    expert: int | None = None


def find_tensors(file: GgufFile, expected: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Place]:
    """Return the place of every canonical tensor. `expected`: names and shapes of all tensors of the model.

    Raises GgufError: one is missing, has another shape or an unusual type, or is not part of the model.
    """
    places: dict[str, Place] = {}
    claimed = {ROPE_FACTORS}
    shapes = dict(expected)
    experts = _count_experts(shapes)
    for name, shape in shapes.items():
        stored, expert = stored_name(name)
        if (tensor := file.tensors.get(stored)) is None:
            raise file.error(stored, f"missing: the model's settings ask for it: {AGAIN}")
        whole = shape if expert is None else (experts, *shape)
        if tensor.shape != whole:
            raise file.error(stored, f"shape {list(tensor.shape)}: the model's settings ask for {list(whole)}")
        if len(shape) == 1 and tensor.kind.elements > 1:
            raise file.error(stored, f"type {tensor.kind.name}: a vector must be F32, F16 or BF16")
        places[name] = Place(tensor, expert)
        claimed.add(stored)
    if foreign := next((name for name in file.tensors if name not in claimed), None):
        raise file.error(foreign, "not a tensor of the model that the settings describe: use a file of another model")
    return places


def stored_name(name: str) -> tuple[str, int | None]:
    """Return the name in a file of a canonical tensor, and its index in a stack of experts."""
    if name in _ENDS:
        return _ENDS[name], None
    if match := _EXPERT.fullmatch(name):
        layer, expert, part = match.groups()
        return f"blk.{layer}.ffn_{part}_exps.weight", int(expert)
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    layer, owner, kind = match.groups()
    return f"blk.{layer}.{_IN_LAYER[owner]}.{kind}", None


def is_turned(architecture: str, name: str) -> bool:
    """Return whether a file keeps the rows of a canonical tensor as pairs that rotate together lie: `stored_rows`.

    llama.cpp does so for queries and keys of the architecture `llama` alone.
    """
    return architecture == "llama" and _TURNED.search(name) is not None


def stored_rows(rows: range, head_dim: int) -> list[int]:
    """Return the rows in the file of the rows of a tensor whose pairs are interleaved.

    Row `h D + j D / 2 + i` (head `h`, half `j`) is stored as row `h D + 2 i + j`; `D` is the head's width.
    """
    half = head_dim // 2
    return [row - row % head_dim + 2 * (row % half) + row % head_dim // half for row in rows]


def _count_experts(names: Iterable[str]) -> int:
    return 1 + max((int(match[2]) for name in names if (match := _EXPERT.fullmatch(name))), default=-1)
