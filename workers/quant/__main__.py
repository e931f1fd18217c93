"""`python -m workers.quant REQUEST.json --out RESULT.json`: the part of `longreach quantize` that needs torch."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from protos.model.spec import ModelSpec
from protos.node.request import ProgressLines, run_request
from workers.quant.rewrite import Recipe, rewrite


def main(argv: list[str] | None = None) -> int:
    """Run one request; returns the exit status of `run_request`."""
    return run_request("workers.quant", "Write a quantised copy of a checkpoint.", run, argv)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request of `cluster.tools.quantize`; returns the result as plain data."""
    torch.set_num_threads(request["threads"])
    recipe = Recipe(request["bits"], request["group"], tuple(request["kinds"]))
    spec = ModelSpec.from_json(json.dumps(request["spec"]))
    on_progress = partial(ProgressLines(), "quantising")
    return rewrite(Path(request["source"]), Path(request["target"]), spec, recipe, on_progress)


if __name__ == "__main__":
    sys.exit(main())
