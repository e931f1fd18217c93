"""transformers (sdpa, bfloat16) on the CPU: prefill and decode of a prompt. Imports nothing of Longreach.

Usage: `python transformers_peer.py CHECKPOINT LENGTH DECODE_TOKENS SEED THREADS VOCABULARY`; prints one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time

import torch


def main() -> None:
    """Measure one prompt and print the result."""
    model_dir, length, decode, seed, threads, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    draw = random.Random(seed)
    ids = torch.tensor([[draw.randint(5, vocabulary - 1) for _ in range(length)]])
    with torch.inference_mode():
        model(torch.arange(5, 261)[None] % vocabulary, logits_to_keep=1)
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
