"""`python -m workers.quant REQUEST.json --out RESULT.json`: the part of `longreach quantize` that needs torch.

Progress goes to standard output, one JSON object per line: `{"phase": text, "done": weights, "total": weights}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from protos.model.spec import ModelSpec
from workers.quant.rewrite import Recipe, rewrite

_MIN_INTERVAL_S = 0.2  # between lines of progress


def main(argv: list[str] | None = None) -> int:
    """Run one request; returns the exit status (2: it cannot be carried out, 130: interrupted)."""
    parser = argparse.ArgumentParser(prog="python -m workers.quant", description=__doc__.splitlines()[0])
    parser.add_argument("request", type=Path, help="JSON file written by `longreach quantize`")
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
    """Carry out a request of `cluster.tools.quantize`; returns the result as plain data."""
    torch.set_num_threads(request["threads"])
    recipe = Recipe(request["bits"], request["group"], tuple(request["kinds"]))
    last = 0.0

    def write_progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _MIN_INTERVAL_S:
            last = now
            print(json.dumps({"phase": "quantising", "done": done, "total": total}), flush=True)

    spec = ModelSpec.from_json(json.dumps(request["spec"]))
    return rewrite(Path(request["source"]), Path(request["target"]), spec, recipe, write_progress)


if __name__ == "__main__":
    sys.exit(main())
