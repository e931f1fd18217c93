"""The other side of `peers`: transformers (sdpa, bfloat16) on the ids our runner takes; run as a module by `peers`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

_DECODE = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("model", type=Path)
    parser.add_argument("lengths")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    high = min(32000, model.config.vocab_size)
    figures: list[dict[str, object]] = []
    with torch.inference_mode():
        model(torch.arange(5, 261)[None] % high, logits_to_keep=1)
        for length in map(int, options.lengths.split(",")):
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(min(5, high - 1), high, (1, length), generator=generator)
            began = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - began
            seconds = []
            for _ in range(_DECODE):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                began = time.perf_counter()
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                seconds.append(time.perf_counter() - began)
            seconds.sort()
            middle = (seconds[_DECODE // 2 - 1] + seconds[_DECODE // 2]) / 2
            figures.append({"name": f"prefill {length}", "value": length / prefill, "unit": "tokens/s"})
            figures.append({"name": f"decode at {length}", "value": middle * 1e3, "unit": "ms a token"})
    options.json.write_text(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
