"""`python -m workers.eval REQUEST.json --out RESULT.json`: the part of `longreach eval recall` that needs torch.

Progress goes to standard output, one JSON object per line: `{"phase": text, "done": tokens, "total": tokens}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from protos.model.spec import ModelSpec
from workers.eval.recall import Setup, Variant, evaluate

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_MIN_INTERVAL_S = 0.2  # between lines of progress


def main(argv: list[str] | None = None) -> int:
    """Run one request; returns the exit status (2: it cannot be carried out, 130: interrupted)."""
    parser = argparse.ArgumentParser(prog="python -m workers.eval", description=__doc__.splitlines()[0])
    parser.add_argument("request", type=Path, help="JSON file written by `longreach eval recall`")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(argv)
    try:
        result = run(json.loads(options.request.read_bytes()))
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    options.out.write_text(json.dumps(result), encoding="utf-8")
    return 0


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request of `cluster.tools.eval.recall`; returns the result as plain data."""
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("cluster.device: cuda: torch finds no GPU here; use cpu")
    spec = ModelSpec.from_json(json.dumps(request["spec"]))
    setup = Setup(
        Path(request["model"]), spec, DTYPES[request["dtype"]], device, request["chunk"], request["page_size"],
        request["dummy"],
    )  # fmt: skip
    others = {
        other["name"]: replace(setup, model=Path(other["model"]), spec=ModelSpec.from_json(json.dumps(other["spec"])))
        for other in request["others"]
    }
    variants = [
        Variant(entry["name"], entry["sparse"], None if entry["kv"] == "auto" else DTYPES[entry["kv"]])
        for entry in request["variants"]
    ]
    last = 0.0

    def write_progress(phase: str, done: int, total: int) -> None:
        """Print a line: a few a second, and always the last one of a phase."""
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _MIN_INTERVAL_S:
            last = now
            print(json.dumps({"phase": phase, "done": done, "total": total}), flush=True)

    return evaluate(setup, request["prompt"], request["next"], variants, write_progress, request["pinned"], others)


if __name__ == "__main__":
    sys.exit(main())
