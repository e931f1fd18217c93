"""Write a quantised copy of a checkpoint, matrix by matrix: never more than one output file is in memory.

The copy is in compressed-tensors' format pack-quantized, which other engines read too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from protos.model.checkpoint import Checkpoint, StoredTensor, expected_tensors
from protos.model.quant.config import KEY
from protos.model.spec import ModelSpec
from protos.model.tensor_names import LM_HEAD
from workers.quant.quantize import quantize_matrix

KINDS = ("attention", "mlp", "experts", "head")  # what can be quantised; routers, norms and embedding stay
OF_LAYERS = KINDS[:3]
_FILE_BYTES = 1 << 30  # of an output file
_INDEX = "model.safetensors.index.json"
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # files that are not copied

OnProgress = Callable[[int, int], None]  # bytes read, of all


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is quantised."""

    bits: int  # 4 or 8
    group: int  # inputs that share a scale
    kinds: tuple[str, ...] = OF_LAYERS


def rewrite(source: Path, target: Path, spec: ModelSpec, recipe: Recipe, on_progress: OnProgress) -> dict[str, Any]:
    """Write the quantised checkpoint `target`, a new empty folder; returns bytes and errors as plain data.

    An error is the root of the squared error of all matrices of a kind in a layer over their squared sum; the head's
    has no layer.

    Raises:
        CheckpointError: the source cannot be read.
        ValueError: the groups do not divide the inputs of a matrix, or there is no head; nothing was written. Or a
            tensor has values that are not finite.
    """
    if "head" in recipe.kinds and spec.tie_word_embeddings:
        raise ValueError("--only: head: the output matrix of this model is its embedding, which stays: leave it out")
    checkpoint = Checkpoint.open(source, spec)
    shapes = expected_tensors(spec)
    chosen = check_groups(shapes, recipe)
    total = sum(math.prod(shape) for shape in shapes.values())
    errors: dict[tuple[int, str], list[float]] = {}
    done = 0
    writer = CheckpointWriter(target)
    with ExitStack() as stack:
        opened = cache(lambda file: stack.enter_context(safe_open(source / file, framework="pt")))
        for name, stored in _in_order(checkpoint, shapes):
            tensor = _read(opened, stored, shapes[name])
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"IN: {name}: has NaN or infinite values: the checkpoint is damaged")
            if kind_of(name) in recipe.kinds:
                found = quantize_matrix(tensor, recipe.bits, recipe.group)
                for part, value in found.packed(recipe.bits).items():
                    writer.add(name.removesuffix("weight") + part, value)
                layer = spec.num_hidden_layers if kind_of(name) == "head" else int(name.split(".")[2])
                sums = errors.setdefault((layer, kind_of(name)), [0.0, 0.0])
                sums[0] += found.squared_error
                sums[1] += found.squared_sum
            else:
                writer.add(name, tensor)
            done += tensor.numel()
            on_progress(done, total)
    size = writer.close()
    _copy_settings(source, target, spec, recipe)
    return {
        "weights": total, "quantized": sum(math.prod(shapes[name]) for name in chosen), "bytes": size,
        "errors": [
            {
                "layer": None if kind == "head" else layer, "kind": kind,
                "relative_error": math.sqrt(lost / whole) if whole else 0.0,
            }
            for (layer, kind), (lost, whole) in sorted(errors.items())
        ],
    }  # fmt: skip


def check_groups(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> list[str]:
    """Return the matrices that a recipe quantises. Raises ValueError: its groups do not divide the inputs of one."""
    chosen = [name for name in shapes if kind_of(name) in recipe.kinds]
    for name in chosen:
        if shapes[name][1] % recipe.group:
            inputs = shapes[name][1]
            fits = math.gcd(*(shapes[other][1] for other in chosen))
            raise ValueError(f"--group: {recipe.group}: {name} has {inputs} inputs: must divide them, such as {fits}")
    return chosen


def kind_of(name: str) -> str:
    """Return what a canonical tensor belongs to: one of KINDS, "" for what is never quantised."""
    if name == LM_HEAD:
        return "head"
    if not name.startswith("model.layers.") or not name.endswith("_proj.weight"):
        return ""
    if ".self_attn." in name:
        return "attention"
    return "experts" if ".experts." in name else "mlp"


def quantization_config(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Return the section of `config.json` that says how the copy is quantised."""
    patterns = {
        "attention": r"re:.*\.self_attn\..*",
        "mlp": r"re:.*\.mlp\.[a-z]+_proj",
        "experts": r"re:.*\.experts\..*",
    }
    kept = [patterns[kind] for kind in OF_LAYERS if kind not in recipe.kinds]
    head = [] if "head" in recipe.kinds else ["lm_head"]
    weights = {
        "num_bits": recipe.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": recipe.group,
        "dynamic": False, "observer": "minmax", "block_structure": None, "actorder": None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "kv_cache_scheme": None,
        "ignore": [*head, *([r"re:.*\.mlp\.gate"] if spec.num_experts else []), *kept],
    }  # fmt: skip


def _in_order(checkpoint: Checkpoint, shapes: dict[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield every tensor that is stored; a head of its own beside a tied embedding included."""
    for name in dict.fromkeys([*shapes, *checkpoint.tensors]):
        if name in checkpoint.tensors:
            shapes.setdefault(name, shapes["model.embed_tokens.weight"])
            yield name, checkpoint.tensors[name]


def _read(opened: Callable[[str], Any], stored: StoredTensor, shape: tuple[int, ...]) -> torch.Tensor:
    file = opened(stored.file)
    if stored.expert is None:
        tensor: torch.Tensor = file.get_tensor(stored.name)
        return tensor
    matrix: torch.Tensor = file.get_slice(stored.name)[stored.expert : stored.expert + 1][0]
    matrix = matrix.T if stored.transposed else matrix
    return matrix[stored.first_row : stored.first_row + shape[0]].contiguous()


class CheckpointWriter:
    """Writes safetensors files of about 1 GiB and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, 0
        self._held: dict[str, torch.Tensor] = {}
        self._size = self._total = 0
        self._places: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; the file it belongs to is written when it is full."""
        if self._held and self._size + tensor.nbytes > _FILE_BYTES:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._size += tensor.nbytes

    def close(self) -> int:
        """Write what is left and the index; returns the bytes of all tensors."""
        self._flush()
        names = {
            f"{number:05d}": f"model-{number:05d}-of-{self._files:05d}.safetensors"
            for number in range(1, self._files + 1)
        }
        if self._files == 1:
            names["00001"] = "model.safetensors"
        for number, name in names.items():
            (self._folder / f"part-{number}").rename(self._folder / name)
        if self._files > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {tensor: names[number] for tensor, number in self._places.items()},
            }
            (self._folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return self._total

    def _flush(self) -> None:
        self._files += 1
        number = f"{self._files:05d}"
        save_file(self._held, self._folder / f"part-{number}", metadata={"format": "pt"})
        self._places |= dict.fromkeys(self._held, number)
        self._total += self._size
        self._held, self._size = {}, 0


def _copy_settings(source: Path, target: Path, spec: ModelSpec, recipe: Recipe) -> None:
    """Copy the other files; those that describe a model get the section `quantization_config`."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name == _INDEX or path.suffix in _LEFT_OUT:
            continue
        if path.suffix == ".json" and isinstance(content := _json(path), dict) and "model_type" in content:
            content = {**content, KEY: quantization_config(spec, recipe)}
            (target / path.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None
