"""Index of the tensors of a Hugging Face checkpoint, verified against `ModelSpec`. No torch.

Only headers are read. Names are canonical (`protos.model.tensor_names`); experts stored as one stack a layer have their
per-expert names. Legend: `M` hidden size, `E` experts, `I` expert width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from protos.model.files import AGAIN, is_gguf, open_regular, read_bounded, shown
from protos.model.gguf.file import GgufError, read_gguf
from protos.model.gguf.names import find_tensors
from protos.model.quant.parts import is_quantized, is_unused_part, parts_of
from protos.model.spec import ModelSpec
from protos.model.tensor_names import EMBEDDING, LM_HEAD, foreign_words, is_unused, other_names, unreadable
from protos.model.weight_files import (
    DTYPES,
    CheckpointError,
    Header,
    header_length,
    read_headers,
    unnamed_files,
    weight_files,
)

__all__ = ["Checkpoint", "CheckpointError", "StoredTensor", "expected_tensors", "fingerprint_of"]

_HEAD = LM_HEAD.removesuffix("weight")
_SAMPLE = 64 * 1024  # bytes of a file's data in the fingerprint, three times
_MAX_TENSORS = 1 << 20  # with those in stacks of experts, which no header bounds: a model of 235B parameters has 36,946


class StoredTensor(NamedTuple):
    """Where a canonical tensor is stored: all of `name`, or in a stack of experts part of one of its matrices."""

    file: str
    name: str
    dtype: str  # F32, BF16 or F16; I32, I8, F8_E4M3, ... in parts of a quantized matrix; in GGUF also Q4_K, ...
    expert: int | None = None  # index in the stack
    first_row: int = 0  # in the canonical orientation: up_proj starts at row I of gate_up_proj
    transposed: bool = False  # the stack holds [in, out] instead of [out, in]


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor the model needs, in layer order; `lm_head.weight` unless tied."""
    return dict(_each_tensor(spec, lambda layer: False))


def _each_tensor(spec: ModelSpec, is_stacked: Callable[[int], bool]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what `expected_tensors` returns one by one, without the experts of layers that store them in a stack."""
    yield EMBEDDING, (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.num_hidden_layers):
        for name, shape in _layer_tensors(spec, layer, is_stacked):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        yield LM_HEAD, (spec.vocab_size, spec.hidden_size)


def _layer_tensors(
    spec: ModelSpec, layer: int, is_stacked: Callable[[int], bool]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, queries = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    keys = spec.num_key_value_heads * spec.head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{name}_proj.weight", (rows, hidden)
        if spec.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if spec.o_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,)
        yield "self_attn.k_norm.weight", (spec.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    if not spec.is_moe_layer(layer):
        yield from _mlp_tensors("mlp", spec.intermediate_size, hidden, spec.mlp_bias)
        return
    yield "mlp.gate.weight", (spec.num_experts, hidden)
    for expert in range(0 if is_stacked(layer) else spec.num_experts):
        yield from _mlp_tensors(f"mlp.experts.{expert}", spec.moe_intermediate_size, hidden, False)


def _mlp_tensors(owner: str, width: int, hidden: int, biased: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield f"{owner}.{part}_proj.weight", shape
        if biased:
            yield f"{owner}.{part}_proj.bias", shape[:1]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified index: every canonical tensor of the model and where it is stored.

    A quantized matrix `X.weight` is there as its parts, such as `X.qweight` (`protos.model.quant.parts`).
    `lm_head.weight` is among them when the model has one of its own: it is not tied to the embedding, or the checkpoint
    says so and still stores another. Tied ones are in `tensors` once, as the embedding.
    """

    model_dir: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, model_dir: Path, spec: ModelSpec) -> Checkpoint:
        """Return the index of the safetensors files of `model_dir`, or of the GGUF file that it is.

        All names, shapes and dtypes are checked.

        Raises CheckpointError: a file or tensor is missing, damaged, of another shape or dtype, or foreign to `spec`.
        """
        if is_gguf(model_dir):
            return cls(model_dir.parent, _index_gguf(model_dir, spec))
        headers = read_headers(model_dir)
        if found := unreadable(headers, spec.quant is not None):
            raise headers[found[0]].error(found[1])
        tensors: dict[str, StoredTensor] = {}

        def is_stacked(layer: int) -> bool:
            if f"model.layers.{layer}.mlp.experts.gate_up_proj" not in headers:
                return False
            tensors.update(_index_stack(model_dir, headers, spec, layer, _MAX_TENSORS - len(tensors)))
            return True

        for name, shape in _each_tensor(spec, is_stacked):
            tensors.update(_index_matrix(model_dir, headers, spec, name, shape))
            if not _is_quantized(headers, spec, name):
                tensors[name] = _stored(_find(model_dir, headers, spec, name, shape))
        if spec.tie_word_embeddings and LM_HEAD in headers:
            head = _find(model_dir, headers, spec, LM_HEAD, (spec.vocab_size, spec.hidden_size))
            if not head.has_data_of(headers.get(EMBEDDING, head)):
                tensors[LM_HEAD] = _stored(head)
        _refuse_foreign(headers, {stored.name for stored in tensors.values()}, spec)
        return cls(model_dir, tensors)

    def is_quantized(self, name: str) -> bool:
        """Return whether the matrix of this canonical name is stored in parts."""
        stored = self.tensors.get(name)
        return stored is None or stored.dtype not in DTYPES

    @property
    def has_own_head(self) -> bool:
        """Whether the rows of `lm_head` are other ones than those of the embedding."""
        return any(name.startswith(_HEAD) for name in self.tensors)


def _is_quantized(headers: dict[str, Header], spec: ModelSpec, name: str) -> bool:
    """Return whether a matrix of a layer or the output matrix is stored in parts; routers never are."""
    if name != LM_HEAD and not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
        return False
    header = headers.get(name)
    return is_quantized(spec.quant, name.removesuffix(".weight"), headers, header.dtype if header else None)


def _index_matrix(
    model_dir: Path, headers: dict[str, Header], spec: ModelSpec, name: str, shape: tuple[int, ...]
) -> dict[str, StoredTensor]:  # fmt: skip
    """Return the checked parts of a quantized matrix, nothing for a plain one."""
    if spec.quant is None or not _is_quantized(headers, spec, name):
        return {}
    module, found = name.removesuffix(".weight"), {}
    for part in parts_of(spec.quant, *shape):
        header = headers.get(f"{module}.{part.name}")
        if header is not None:
            header.check(*part.shapes, dtypes=part.dtypes)
            found[f"{module}.{part.name}"] = _stored(header)
        elif not part.optional:
            raise _missing(model_dir, headers, f"{module}.{part.name}")
    return found


def _index_gguf(path: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    try:
        places = find_tensors(read_gguf(path), _each_tensor(spec, lambda layer: False))
    except GgufError as error:
        raise CheckpointError(str(error)) from error
    return {
        name: StoredTensor(path.name, place.tensor.name, place.tensor.kind.name, place.expert)
        for name, place in places.items()
    }


def _stored(header: Header, expert: int | None = None, first_row: int = 0, transposed: bool = False) -> StoredTensor:
    return StoredTensor(header.path.name, header.name, header.dtype, expert, first_row, transposed)


def _find(
    model_dir: Path, headers: dict[str, Header], spec: ModelSpec, name: str, shape: tuple[int, ...]
) -> Header:  # fmt: skip
    """Return a stored tensor, checked; a tied embedding may be stored as `lm_head.weight` alone, as in transformers."""
    header = headers.get(name)
    if header is None and name == EMBEDDING and spec.tie_word_embeddings:
        header = headers.get(LM_HEAD)
    if header is None:
        hint = "; config.json does not set tie_word_embeddings" if name == LM_HEAD else ""
        raise _missing(model_dir, headers, name, hint)
    header.check(shape)
    return header


def _missing(model_dir: Path, headers: dict[str, Header], name: str, hint: str = "") -> CheckpointError:
    reason = other_names(headers)
    if reason is None:
        unnamed = unnamed_files(model_dir)
        reason = (
            f"no index names {shown(', '.join(unnamed))} of this folder: {AGAIN}, with its index" if unnamed else AGAIN
        )
    return CheckpointError(f"{model_dir}: {name}: missing from the checkpoint: {reason}{hint}")


def _index_stack(
    model_dir: Path, headers: dict[str, Header], spec: ModelSpec, layer: int, room: int
) -> dict[str, StoredTensor]:  # fmt: skip
    """Return the experts of a fused layer, at most `room` tensors.

    The two shapes together always determine the orientation: both matrices are square only when `I == M` and `2I == M`.
    """
    prefix = f"model.layers.{layer}.mlp.experts."
    names = (prefix + "gate_up_proj", prefix + "down_proj")
    if names[1] not in headers:
        raise _missing(model_dir, headers, names[1])
    count, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    gate_up, down = headers[names[0]], headers[names[1]]
    gate_up_shapes = ((count, 2 * width, hidden), (count, hidden, 2 * width))  # plain, transposed
    down_shapes = ((count, hidden, width), (count, width, hidden))
    gate_up.check(*gate_up_shapes)
    is_square = gate_up_shapes[0] == gate_up_shapes[1]  # then the other matrix tells
    transposed = down.shape == down_shapes[1] if is_square else gate_up.shape == gate_up_shapes[1]
    down.check(down_shapes[transposed])
    if 3 * count > room:
        raise gate_up.error(f"{count} experts: at most {_MAX_TENSORS} tensors are read, more than any model has")
    tensors = {}
    for expert in range(count):
        for part, header, first_row in (("gate", gate_up, 0), ("up", gate_up, width), ("down", down, 0)):
            name = f"{prefix}{expert}.{part}_proj.weight"
            if name in headers:
                raise headers[name].error("also stored in a stack of experts; keep one")
            tensors[name] = _stored(header, expert, first_row, transposed)
    return tensors


def _refuse_foreign(headers: dict[str, Header], claimed: set[str], spec: ModelSpec) -> None:
    """Raise CheckpointError for a tensor that the decoder would leave out and that might change the logits."""
    for name, header in headers.items():
        if header.name not in claimed and name != LM_HEAD and not is_unused(name):
            if spec.quant is not None and (is_unused_part(name) or (name.endswith("_proj.bias") and header.is_zero())):
                continue  # GPTQ stores a bias of zeros where a model has none
            raise header.error(foreign_words(name, spec))


def fingerprint_of(model_dir: Path) -> str:
    """Return the SHA-256 (hex) of `config.json` and of each weight file's name, size, header and three data samples.

    The samples (64 KiB at the start, middle and end) distinguish fine-tunes of one model without reading it whole.
    Of a GGUF file it is that of size, header and samples.
    Raises CheckpointError: a file is missing or no safetensors file.
    """
    digest = hashlib.sha256()
    try:
        if is_gguf(model_dir):
            _add_data(digest, model_dir, 0, read_gguf(model_dir).header_bytes)
            return digest.hexdigest()
        _add(digest, read_bounded(model_dir / "config.json"))
        for file in weight_files(model_dir):
            _add_file(digest, model_dir / file)
    except GgufError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}): {AGAIN}") from error
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with open_regular(path) as handle:
        length = header_length(path, os.fstat(handle.fileno()).st_size, handle.read(8))
    _add(digest, path.name.encode())
    _add_data(digest, path, 8, length)


def _add_data(digest: hashlib._Hash, path: Path, start: int, length: int) -> None:
    """Add the size, the header of `length` bytes at `start`, and samples of what follows."""
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        _add(digest, size.to_bytes(8, "little"))
        handle.seek(start)
        _add(digest, handle.read(length))
        data = start + length
        for at in (data, data + max(0, size - data - _SAMPLE) // 2, max(data, size - _SAMPLE)):
            handle.seek(at)
            _add(digest, handle.read(_SAMPLE))


def _add(digest: hashlib._Hash, value: bytes) -> None:
    """Add a value with its length first, so that no two sequences of values hash alike."""
    digest.update(len(value).to_bytes(8, "little"))
    digest.update(value)
