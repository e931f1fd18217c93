"""The one-process runner: prefill and decode by the runner of a stage, without Ray and sockets; its model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec, RopeSpec
from workers.bench.timing import Figure, median_figure
from workers.eval.whole_model import SequenceFeed, WholeModel

PAGE = 64  # tokens
_WARM_UP = 256  # tokens
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def benchmark_spec(layers: int = 8) -> ModelSpec:
    """Return the built-in shape, "qwen3moe-0.7b": the widths of a real model, few enough layers for two cores."""
    return ModelSpec(
        model_type="qwen3_moe", vocab_size=49152, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, intermediate_size=3072, rms_norm_eps=1e-6, tie_word_embeddings=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=True, rope=RopeSpec(1e7), max_position_embeddings=262144,
        dtype="bfloat16", eos_token_ids=(2,), num_experts=64, num_experts_per_tok=8, moe_intermediate_size=384,
    )  # fmt: skip


class Timings(NamedTuple):
    """Seconds to the first token, and of every decode step after it."""

    prefill_s: float
    decode_s: list[float]


class OneProcess:
    """A model, from a folder or a shape with random weights, and the KV of one sequence of `tokens`.

    A prefill step has at most `chunk` tokens.
    """

    def __init__(
        self, model: Path | ModelSpec, dtype: torch.dtype, device: torch.device, tokens: int, chunk: int
    ) -> None:
        path, self.spec = (model, load_model_spec(model)) if isinstance(model, Path) else (None, model)
        self._runner = WholeModel(path, self.spec, dtype, device).runner(self.spec, tokens, PAGE)
        self._chunk = chunk

    def prompt(self, length: int) -> list[int]:
        """Return uniform random ids in 5..31999 (or below the vocabulary size), from seed 1."""
        high = min(32000, self.spec.vocab_size)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(min(5, high - 1), high, (length,), generator=generator).tolist()

    def run(self, ids: list[int], decode: int) -> Timings:
        """Prefill `ids` in chunks up to the first token, then decode greedily."""
        feed = SequenceFeed(self._runner, PAGE, len(ids))
        began = time.perf_counter()
        for start in range(0, len(ids), self._chunk):
            feed.take(ids[start : start + self._chunk])
        return Timings(time.perf_counter() - began, _decode(feed, feed.tokens[-1], decode))

    def rounds(self, requests: Iterable[str], ids: list[int], decode: int) -> Iterator[float]:
        """Yield the seconds to the first token for every "prefill", and the mean seconds of a step for every "decode".

        So another program can measure in turns with this one, whose memory stays allocated.
        """
        self.run(ids[: 2 * self._chunk], 2)
        computed = False
        for request in requests:
            is_decode = request.strip() == "decode"
            if not is_decode or not computed:  # decode steps need the KV of the prompt
                seconds = self.run(ids, 0).prefill_s
                computed = True
            if is_decode:
                feed = SequenceFeed(self._runner, PAGE, len(ids))
                feed.skip(ids)
                seconds = statistics.fmean(_decode(feed, ids[-1], decode))
            yield seconds


def _decode(feed: SequenceFeed, token: int, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        feed.take([token])
        seconds.append(time.perf_counter() - began)
        token = feed.tokens[-1]
    return seconds


def run_model(
    model: Path | ModelSpec, dtype: torch.dtype, device: torch.device, lengths: list[int], chunk: int, decode: int,
    repeats: int,
) -> Iterator[Figure]:  # fmt: skip
    """Measure prefill and, when `decode` is above 0, decode steps at each length.

    A prompt of 256 tokens warms up; the first run at a length still has new shapes and counts as one of `repeats`.
    """
    process = OneProcess(model, dtype, device, max(*lengths, _WARM_UP) + decode + 1, chunk)
    process.run(process.prompt(_WARM_UP), 2)
    for length in lengths:
        ids = process.prompt(length)
        runs = [process.run(ids, decode) for _ in range(repeats)]
        rates = [length / run.prefill_s for run in runs]
        yield median_figure(f"prefill {length}", rates, "tokens/s")
        yield Figure(f"prefill {length}, first run", runs[0].prefill_s, "s")
        if decode:
            times = [second * 1e3 for run in runs for second in run.decode_s]
            yield median_figure(f"decode at {length}", times, "ms a token")
