"""`python -m workers.eval REQUEST.json --out RESULT.json`: the part of `longreach eval recall` that needs torch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from protos.model.spec import ModelSpec
from protos.node.request import ProgressLines, run_request
from workers.eval.recall import Setup, Variant, evaluate

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


def main(argv: list[str] | None = None) -> int:
    """Run one request; returns the exit status of `run_request`."""
    return run_request("workers.eval", "Compare ways to read one document.", run, argv)


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
    return evaluate(setup, request["prompt"], request["next"], variants, ProgressLines(), request["pinned"], others)


if __name__ == "__main__":
    sys.exit(main())
