"""`longreach quantize`: a copy of a checkpoint with 4- or 8-bit weights; a process of `workers.quant` computes.

The copy appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.common.units import format_bytes
from cluster.tools.torch_process import run_torch
from protos.errors import UserError
from protos.model.config_json import load_model_spec
from protos.model.files import is_gguf
from protos.model.folder import explain, resolve, served_name
from protos.model.spec import ModelSpec
from protos.node.environment import usable_cores

KINDS = ("attention", "mlp", "experts", "head")  # as of workers.quant.rewrite


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What is written."""

    source: Path
    target: Path
    bits: int  # 4 or 8
    group: int = 128  # inputs that share a scale
    kinds: tuple[str, ...] = field(default=KINDS[:3])

    def __post_init__(self) -> None:
        if self.group < 16 or self.group % 16:
            raise UserError(f"--group: {self.group}: must be a multiple of 16")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise UserError(f"--only: {unknown[0]!r}: must be some of {', '.join(KINDS)}")


def quantize(options: QuantizeOptions, on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write the copy and return its sizes and errors by layer.

    Raises:
        UserError: the checkpoint cannot be quantised, or the folder cannot be written; nothing is left behind.
        ProcessFailed: the computing process died; nothing is left behind.
    """
    source, spec = _source(options)
    target = options.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"OUT: {target}: is there already: name a new folder")
    if target.is_symlink() or target.is_mount():  # neither can be replaced by the whole copy
        raise UserError(f"OUT: {target}: is a link or a mounted disk: name a new folder, such as {target / 'model'}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"OUT: {target}: its parent folder does not exist: create it first")
    before = _weight_bytes(source)
    _check_room(target.absolute().parent, before, options.bits)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
    try:
        request = {
            "source": str(source), "target": str(partial), "spec": json.loads(spec.to_json()), "bits": options.bits,
            "group": options.group, "kinds": list(options.kinds), "threads": usable_cores(),
        }  # fmt: skip
        result = run_torch("workers.quant", request, on_progress)
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {
        "what": "quantize", "model": served_name(source), "target": target.name, "bits": options.bits,
        "group": options.group, "kinds": list(options.kinds), "bytes_before": before, **result,
    }  # fmt: skip


def _source(options: QuantizeOptions) -> tuple[Path, ModelSpec]:
    """Return the folder of the checkpoint and what it is. Raises UserError."""
    if is_gguf(options.source):
        raise UserError(f"IN: {options.source}: a GGUF file: must be a folder of safetensors in bfloat16 or float32")
    source = resolve(options.source)
    if not (source / "config.json").is_file():
        raise UserError(f"IN: {source}: must be a model folder: {explain(source)}")
    spec = load_model_spec(source)
    if spec.quant is not None:
        raise UserError(
            f"IN: {source}: is quantised already ({spec.quant.format}): use the checkpoint it was made from"
        )
    dense = sum(not spec.is_moe_layer(layer) for layer in range(spec.num_hidden_layers))
    has = {"mlp": dense > 0, "experts": dense < spec.num_hidden_layers}
    own = [kind for kind in KINDS if has.get(kind, True)]
    if not any(kind in own for kind in options.kinds):
        wanted = ",".join(options.kinds)
        raise UserError(f"--only: {wanted!r}: nothing of that is in this model: must be some of {', '.join(own)}")
    return source, spec


def _weight_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.glob("*.safetensors"))


def _check_room(folder: Path, size: int, bits: int) -> None:
    """Raise UserError where the disk has not about the room of the copy; sources have 16 bits a weight."""
    needed, free = size * bits // 16, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"OUT: {folder}: {format_bytes(free)} are free on its disk: at least {format_bytes(needed)} are needed"
        )
