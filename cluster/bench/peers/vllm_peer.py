"""vLLM on the CPU, run by a Python that has it: prefill and decode of random ids. Imports nothing of Longreach.

Usage: `python vllm_peer.py CHECKPOINT LENGTH DECODE_TOKENS SEED THREADS VOCABULARY`; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time


def main() -> None:
    """Measure one prompt and print the result."""
    model, length, decode, seed, threads, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "6")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(
        model, max_model_len=length + decode + 64, dtype="bfloat16", enable_prefix_caching=False, max_num_seqs=2,
        skip_tokenizer_init=True,
    ).llm_engine  # fmt: skip

    def run(count: int, tokens: int, source: int) -> list[float]:
        """Return the seconds from submission to every token."""
        ids = random.Random(source)
        prompt = {"prompt_token_ids": [ids.randint(5, vocabulary - 1) for _ in range(count)]}
        params = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        began = time.perf_counter()
        engine.add_request(f"{source}-{count}", prompt, params)
        seen: list[float] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter() - began
                seen += [now] * (len(output.outputs[0].token_ids) - len(seen))
        return seen

    run(256, 2, 1_000_000)
    times = run(length, 1 + decode, seed)
    result = {"version": vllm.__version__, "first_token_s": times[0], "decode_s": (times[-1] - times[0]) / decode}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
