"""transformers (sdpa, bfloat16) on the CPU: prefill and decode of the ids of our runner. Imports nothing of Longreach.

Usage: `python transformers_peer.py CHECKPOINT LENGTH DECODE_TOKENS THREADS`; prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch


def main() -> None:
    """Measure one prompt and print the result."""
    model_dir, length, decode, threads = sys.argv[1], *map(int, sys.argv[2:])
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    high = min(32000, model.config.vocab_size)
    ids = torch.randint(min(5, high - 1), high, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(torch.arange(5, 261)[None] % high, logits_to_keep=1)
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - began
        seconds = []
        for _ in range(decode):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            began = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - began)
    result = {"version": transformers.__version__, "first_token_s": prefill, "decode_s": statistics.fmean(seconds)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
