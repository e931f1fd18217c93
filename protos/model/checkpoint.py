"""Index of the tensors of a Hugging Face checkpoint, verified against `ModelSpec`. No torch.

Only headers are read. Names are the canonical ones of Hugging Face (`model.layers.0.self_attn.q_proj.weight`); experts
stored as one stack a layer have their per-expert names. Legend: `M` hidden size, `E` experts, `I` expert width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from protos.errors import UserError
from protos.model.spec import ModelSpec

DTYPES = ("F32", "BF16", "F16")
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLE = 64 * 1024  # bytes of a file's data in the fingerprint, three times
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_AGAIN = "download it again"


class CheckpointError(UserError):
    """Weights that are missing, damaged, or not those of the model in `config.json`."""


class StoredTensor(NamedTuple):
    """Where a canonical tensor is stored: all of `name`, or in a stack of experts part of one of its matrices."""

    file: str
    name: str
    dtype: str  # F32, BF16 or F16
    expert: int | None = None  # index in the stack
    first_row: int = 0  # in the canonical orientation: up_proj starts at row I of gate_up_proj
    transposed: bool = False  # the stack holds [in, out] instead of [out, in]


class _Header(NamedTuple):
    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def error(self, problem: str) -> CheckpointError:
        shown = self.name if self.name.isprintable() else ascii(self.name)  # names of foreign tensors are input
        return CheckpointError(f"{self.path}: {shown}: {problem}")

    def check(self, *allowed: tuple[int, ...]) -> None:
        if self.shape not in allowed:
            shapes = " or ".join(str(list(shape)) for shape in allowed)
            raise self.error(f"shape {list(self.shape)}: config.json asks for {shapes}")
        if self.dtype not in DTYPES:
            raise self.error(f"dtype {self.dtype}: must be one of {', '.join(DTYPES)}")

    def stored(self, expert: int | None = None, first_row: int = 0, transposed: bool = False) -> StoredTensor:
        return StoredTensor(self.path.name, self.name, self.dtype, expert, first_row, transposed)


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor the model needs, in layer order; `lm_head.weight` unless tied."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_tensors(spec, layer)}
    tensors["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        tensors[LM_HEAD] = (spec.vocab_size, spec.hidden_size)
    return tensors


def _layer_tensors(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
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
    width, owners = spec.intermediate_size, ["mlp"]
    if has_experts := spec.is_moe_layer(layer):
        yield "mlp.gate.weight", (spec.num_experts, hidden)
        width, owners = spec.moe_intermediate_size, [f"mlp.experts.{expert}" for expert in range(spec.num_experts)]
    for owner in owners:
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            yield f"{owner}.{part}_proj.weight", shape
            if spec.mlp_bias and not has_experts:
                yield f"{owner}.{part}_proj.bias", shape[:1]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified index: every canonical tensor of the model and where it is stored."""

    model_dir: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, model_dir: Path, spec: ModelSpec) -> Checkpoint:
        """Return the index of the safetensors files of `model_dir`; all names, shapes and dtypes are checked.

        Raises CheckpointError: a file or tensor is missing, damaged, of another shape or dtype, or foreign to `spec`.
        """
        headers = _read_headers(model_dir)
        tensors: dict[str, StoredTensor] = {}
        for layer in range(spec.num_hidden_layers):
            if f"model.layers.{layer}.mlp.experts.gate_up_proj" in headers and spec.is_moe_layer(layer):
                tensors |= _index_stack(model_dir, headers, spec, layer)
        for name, shape in expected_tensors(spec).items():
            if name in tensors:
                if name in headers:
                    raise headers[name].error("also stored in a stack of experts; keep one")
                continue
            header = headers.get(name)
            if header is None:
                hint = "; config.json sets tie_word_embeddings to false" if name == LM_HEAD else ""
                raise CheckpointError(f"{model_dir}: {name}: missing from the checkpoint: {_AGAIN}{hint}")
            header.check(shape)
            tensors[name] = header.stored()
        _refuse_foreign(headers, {stored.name for stored in tensors.values()})
        return cls(model_dir, tensors)


def _index_stack(model_dir: Path, headers: dict[str, _Header], spec: ModelSpec, layer: int) -> dict[str, StoredTensor]:
    """Return the experts of a fused layer.

    The two shapes together always determine the orientation: both matrices are square only when `I == M` and `2I == M`.
    """
    prefix = f"model.layers.{layer}.mlp.experts."
    names = (prefix + "gate_up_proj", prefix + "down_proj")
    if names[1] not in headers:
        raise CheckpointError(f"{model_dir}: {names[1]}: missing from the checkpoint: {_AGAIN}")
    count, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    gate_up, down = headers[names[0]], headers[names[1]]
    gate_up_shapes = ((count, 2 * width, hidden), (count, hidden, 2 * width))  # plain, transposed
    down_shapes = ((count, hidden, width), (count, width, hidden))
    gate_up.check(*gate_up_shapes)
    is_square = gate_up_shapes[0] == gate_up_shapes[1]  # then the other matrix tells
    transposed = down.shape == down_shapes[1] if is_square else gate_up.shape == gate_up_shapes[1]
    down.check(down_shapes[transposed])
    return {
        f"{prefix}{expert}.{part}_proj.weight": header.stored(expert, first_row, transposed)
        for expert in range(count)
        for part, header, first_row in (("gate", gate_up, 0), ("up", gate_up, width), ("down", down, 0))
    }


def _refuse_foreign(headers: dict[str, _Header], claimed: set[str]) -> None:
    """Raise CheckpointError for a tensor that the decoder would leave out, unless it is recomputed or tied."""
    for name in headers.keys() - claimed:
        if name.startswith(("model.", "lm_head.")) and name != LM_HEAD and not name.endswith("rotary_emb.inv_freq"):
            raise headers[name].error("not a tensor of the model in config.json")


def _read_headers(model_dir: Path) -> dict[str, _Header]:
    """Return file, dtype and shape by name; with an index, each tensor is taken from the file the index names."""
    weight_map = _weight_map(model_dir)
    headers: dict[str, _Header] = {}
    for file in _files(weight_map):
        path = model_dir / file
        try:
            with safe_open(path, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if weight_map is None or weight_map.get(name) == file:
                        part = handle.get_slice(name)
                        headers[name] = _Header(path, name, part.get_dtype(), tuple(part.get_shape()))
        except FileNotFoundError as error:
            named = f": named by {_INDEX}" if weight_map is not None else ""
            raise CheckpointError(f"{path}: no such file{named}: {_AGAIN}") from error
        except (SafetensorError, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: damaged or truncated ({reason}): {_AGAIN}") from error
    for name, file in (weight_map or {}).items():
        if name not in headers:
            raise _Header(model_dir / file, name, "", ()).error(f"not in the file that {_INDEX} names: {_AGAIN}")
    return headers


def _weight_map(model_dir: Path) -> dict[str, str] | None:
    """Return the `weight_map` of the index, None for a checkpoint in one file, which goes first as in transformers."""
    path = model_dir / _INDEX
    if (model_dir / _SINGLE).exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{model_dir}: neither {_SINGLE} nor {_INDEX}: name a folder with weights") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): {_AGAIN}") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: must be an object of tensor name to file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\\0"):
            raise CheckpointError(f"{path}: weight_map: {name!r}: {file!r}: must be a .safetensors file of this folder")
    return weight_map


def _files(weight_map: dict[str, str] | None) -> list[str]:
    return [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def fingerprint_of(model_dir: Path) -> str:
    """Return the SHA-256 (hex) of `config.json` and of each weight file's name, size, header and three data samples.

    The samples (64 KiB at the start, middle and end) distinguish fine-tunes of one model without reading it whole.
    Raises CheckpointError: a file is missing or no safetensors file.
    """
    digest = hashlib.sha256()
    try:
        _add(digest, (model_dir / "config.json").read_bytes())
        for file in _files(_weight_map(model_dir)):
            _add_file(digest, model_dir / file)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}): {_AGAIN}") from error
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: damaged or truncated (header of {length} bytes): {_AGAIN}")
        _add(digest, path.name.encode())
        _add(digest, size.to_bytes(8, "little"))
        _add(digest, handle.read(length))
        data = 8 + length
        for start in (data, data + max(0, size - data - _SAMPLE) // 2, max(data, size - _SAMPLE)):
            handle.seek(start)
            _add(digest, handle.read(_SAMPLE))


def _add(digest: hashlib._Hash, value: bytes) -> None:
    """Add a value with its length first, so that no two sequences of values hash alike."""
    digest.update(len(value).to_bytes(8, "little"))
    digest.update(value)
