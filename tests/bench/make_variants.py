"""Copies of a checkpoint in other formats: `python -m tests.bench.make_variants SOURCE OUT [--kinds int8,fp8,...]`.

`SOURCE` is a folder in bfloat16 or a GGUF file, which is unpacked first. `int8` and `int4` are those of
`longreach quantize`, `fp8` is the layout of Qwen's own checkpoints, and types of GGUF are packed by the library `gguf`
or, given `--llama-quantize`, by llama.cpp, which also knows `q4_k_m`, `q5_k_m` and `q6_k`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoTokenizer

from cluster.tools.quantize import QuantizeOptions, quantize
from protos.errors import UserError
from tests.support.gguf_files import ARCHITECTURES, convert
from tests.support.real.unpack import unpacked_model

BLOCK = 128  # rows and columns that share an FP8 scale
LIBRARY = {"bf16-gguf": Kind.BF16, "q8_0": Kind.Q8_0, "q5_1": Kind.Q5_1, "q5_0": Kind.Q5_0, "q4_1": Kind.Q4_1,
           "q4_0": Kind.Q4_0}  # fmt: skip
LLAMA_CPP = (*LIBRARY, "q6_k", "q5_k_m", "q4_k_m")
FOLDERS = ("int8", "int4", "fp8")


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes `[N, K]` and the scales `[ceil(N / 128), ceil(K / 128)]` they are multiplied by."""
    rows, columns = weight.shape
    wide = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = wide.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [n, 128, k, 128]
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scales


def write_fp8(source: Path, target: Path) -> None:
    """Write a folder as Qwen's FP8 checkpoints are: matrices of layers but for routers, in blocks."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if ".layers." in name and name.endswith("_proj.weight"):
                tensors[name], tensors[name + "_scale_inv"] = fp8(tensor)
            else:
                tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    section = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK] * 2}
    for file in target.glob("config*.json"):  # of the same weights at other lengths
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}, indent=1))


def write_gguf(source: Path, target: Path, kind: str, llama_quantize: Path | None) -> None:
    """Write a folder as a GGUF file of one type, or of llama.cpp's mixture of that name.

    The library has matrices of one type, the head too; routers stay wide as in llama.cpp.
    """
    config = json.loads((source / "config.json").read_text())
    named = {f"{ARCHITECTURES[config['model_type']]}.vocab_size": config["vocab_size"]}
    if llama_quantize is None:
        convert(source, target, lambda name: Kind.F32 if "ffn_gate_inp" in name else LIBRARY[kind], named)
        return
    wide = target.with_name("wide.gguf")
    if not wide.exists():
        convert(source, wide, lambda name: Kind.BF16, named)
    command = [llama_quantize, wide, target, kind.removesuffix("-gguf").upper()]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{llama_quantize}: exit {done.returncode}: {(done.stderr.strip() or 'no message')[-300:]}")


def unpacked(source: Path, out: Path) -> Path:
    """Return a folder in bfloat16 of a GGUF file."""
    folder = out / "bf16"
    if not folder.exists():
        unpacked_model(source).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def make(source: Path, out: Path, kinds: list[str], group: int, llama_quantize: Path | None) -> list[Path]:
    """Write the copies that are not there yet and return them all, the source in bfloat16 first."""
    out.mkdir(parents=True, exist_ok=True)
    folder = unpacked(source, out) if source.suffix == ".gguf" else source
    paths = [folder]
    for kind in kinds:
        target = out / (kind if kind in FOLDERS else f"{kind}.gguf")
        if target.exists():
            pass
        elif kind in ("int8", "int4"):
            quantize(QuantizeOptions(folder, target, int(kind[3:]), group), lambda phase, done, total: None)
        elif kind == "fp8":
            write_fp8(folder, target)
        else:
            write_gguf(folder, target, kind, llama_quantize)
        paths.append(target)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: a copy cannot be made)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.make_variants", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", help="default: all that can be made")
    parser.add_argument("--group", type=int, default=128, help="of int8 and int4 (default: 128)")
    parser.add_argument("--llama-quantize", type=Path, help="llama.cpp's program")
    options = parser.parse_args(argv)
    known = (*FOLDERS, *(LIBRARY if options.llama_quantize is None else LLAMA_CPP))
    kinds = options.kinds.split(",") if options.kinds else list(known)
    if unknown := [kind for kind in kinds if kind not in known]:
        parser.error(f"--kinds: {unknown[0]!r}: must be some of {', '.join(known)}")
    try:
        print(*make(options.source, options.out, kinds, options.group, options.llama_quantize), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
