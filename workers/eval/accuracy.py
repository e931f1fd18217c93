"""What formats of weights lose, here and in transformers on the same files: `python -m workers.eval.accuracy`.

Both engines read the first tokens of one text, without attending sparsely. Logits after each token are compared with
those of the original checkpoint in float32 in the same engine, and between the engines. Where transformers cannot read
a file, its line says why.

Legend: `N` tokens of the text, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from protos.model.config_json import load_model_spec
from protos.model.files import is_gguf
from protos.node.environment import write_result
from workers.eval.recall import compare
from workers.eval.whole_model import WholeModel

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PAGE = 64
_CHUNK = 512  # tokens of a step
_ROWS = 64  # positions that are compared at a time, in float64
_WORST = 200  # characters of a problem that are kept

Logits = torch.Tensor  # [N, V] float32
OnStatus = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AccuracySetup:
    """What is compared: checkpoints (folders or GGUF files) over the ids of a text, and the type they compute in."""

    original: Path
    others: tuple[Path, ...]
    ids: tuple[int, ...]
    dtype: torch.dtype


def our_logits(model: Path, dtype: torch.dtype, ids: Sequence[int]) -> Logits:
    """Return our logits after each token of a text."""
    spec = load_model_spec(model)
    whole = WholeModel(model, spec, dtype, torch.device("cpu"))
    return whole.text_logits(spec, ids, _PAGE, _CHUNK)


@torch.inference_mode()
def their_logits(model: Path, dtype: torch.dtype, ids: Sequence[int]) -> Logits:
    """Return transformers' logits after each token of a text; quantised weights are unpacked by its libraries.

    Needs accelerate for GGUF files and FP8. Raises whatever transformers raises where it cannot read a checkpoint.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    if is_gguf(model):
        folder, more = model.parent, {"gguf_file": model.name}
    else:
        section = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        unpacked = {"compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}
        kind = unpacked.get(str(section.get("quant_method")))
        folder, more = model, {} if kind is None else {"quantization_config": kind(dequantize=True)}
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **more).eval()
    return read.to(dtype)(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def difference(reference: Logits, other: Logits) -> dict[str, float]:
    """Return the share of equal best tokens, and mean and largest KL(reference || other) in nats."""
    same, total, largest = 0, 0.0, 0.0
    for start in range(0, len(reference), _ROWS):
        part = compare(reference[start : start + _ROWS], other[start : start + _ROWS])
        same += part["same_top1"]
        total += part["kl_mean"] * len(part["positions"]["kl"])
        largest = max(largest, part["kl_max"])
    return {"same_top1": same / len(reference), "kl_mean": total / len(reference), "kl_max": largest}


def run_accuracy(
    setup: AccuracySetup, on_status: OnStatus, theirs: Callable[..., Logits] | None = None
) -> list[dict[str, Any]]:
    """Return a row a checkpoint, the original in `dtype` first: sizes, and what each engine loses against itself.

    `ours` and `reference` compare with the original in float32, `between` our logits with the reference's.
    """
    theirs = theirs or their_logits
    on_status(f"{setup.original.name} in float32")
    ours = our_logits(setup.original, torch.float32, setup.ids)
    reference = theirs(setup.original, torch.float32, setup.ids)
    rows: list[dict[str, Any]] = [
        {"name": setup.original.name, "dtype": "float32", "bytes": weight_bytes(setup.original)}
        | {"between": difference(reference, ours)}
    ]
    for model in (setup.original, *setup.others):
        on_status(model.name)
        row: dict[str, Any] = {"name": model.name, "dtype": str(setup.dtype).removeprefix("torch.")}
        got = our_logits(model, setup.dtype, setup.ids)
        row |= {"bytes": weight_bytes(model), "ours": difference(ours, got)}
        gc.collect()
        try:
            expected = theirs(model, setup.dtype, setup.ids)
        except Exception as error:  # noqa: BLE001 - of any kind: the row says it
            row["reference"] = {"problem": " ".join(f"{type(error).__name__}: {error}".split())[:_WORST]}
        else:
            row |= {"reference": difference(reference, expected), "between": difference(expected, got)}
        rows.append(row)
        gc.collect()
    return rows


def weight_bytes(model: Path) -> int:
    """Return the bytes of the files of weights."""
    files = [model] if is_gguf(model) else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of the rows."""
    titles = (
        "checkpoint", "computed in", "MB", "KL here", "in transformers", "between them", "same next token here",
        "in transformers",
    )  # fmt: skip
    table = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        kl = [_figure(row, key, "kl_mean", "{:.2g}") for key in ("ours", "reference", "between")]
        same = [_figure(row, key, "same_top1", "{:.1%}") for key in ("ours", "reference")]
        cells = [row["name"], row["dtype"], f"{row['bytes'] / 1e6:,.1f}", *kl, *same]
        table.append(f"| {' | '.join(cells)} |")
    return table


def _figure(row: dict[str, Any], key: str, name: str, form: str) -> str:
    found = row.get(key, {})
    return form.format(found[name]) if name in found else "cannot read it" if "problem" in found else ""


def text_ids(model: Path, document: Path, count: int) -> tuple[int, ...]:
    """Return the first ids of a text file, which may be packed by gzip, by transformers' tokenizer of the model.

    Raises ValueError: the text is too short.
    """
    from transformers import AutoTokenizer

    data = document.read_bytes()
    text = (gzip.decompress(data) if document.suffix == ".gz" else data).decode("utf-8")
    folder, more = (model.parent, {"gguf_file": model.name}) if is_gguf(model) else (model, {})
    ids = AutoTokenizer.from_pretrained(folder, **more).encode(text[: 16 * count], add_special_tokens=True)
    if len(ids) < count:
        raise ValueError(f"--tokens: {count}: {document} has {len(ids)} tokens: lower it to that")
    return tuple(ids[:count])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison of the command line; returns the exit status (2: it cannot be carried out)."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.eval.accuracy",
        description="KL and equal next tokens of checkpoints, here and in transformers.",
    )
    parser.add_argument("original", type=Path, help="folder or GGUF file that the others were made from")
    parser.add_argument("others", type=Path, nargs="*", help="folders or GGUF files with the same tokens")
    parser.add_argument("--document", type=Path, required=True, help="text file (or .gz) whose beginning is read")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text (default: 1024)")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16", help="in which the others compute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args(argv)
    try:
        for path in (options.original, *options.others, options.document):
            if not path.exists():
                raise ValueError(f"{path}: is not there")
        if options.tokens < 1:
            raise ValueError(f"--tokens: {options.tokens}: must be at least 1")
        ids = text_ids(options.original, options.document, options.tokens)
        setup = AccuracySetup(options.original, tuple(options.others), ids, _DTYPES[options.dtype])
        rows = run_accuracy(setup, lambda text: print(f"reading with {text}", file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines(rows)))
    if options.json:
        import transformers

        config = {"document": options.document.name, "tokens": options.tokens, "dtype": options.dtype}
        result = {"what": "accuracy", "config": config, "rows": rows}
        write_result(options.json, result, torch=torch.__version__, transformers=transformers.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
