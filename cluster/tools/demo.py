"""The demonstration behind `longreach demo`: needles in a book, found by a real cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.config.configs_dir import configs_dir
from cluster.config.deployment import Deployment
from cluster.engine.outputs import Generation
from cluster.engine.runtime import ClusterRuntime
from cluster.tools.assets import needle_dir
from cluster.tools.demo_http import HttpAnswer, ask_over_http, can_serve_http
from cluster.tools.display import Display
from cluster.tools.eval.haystack import Haystack, build_haystack, is_right
from cluster.tools.eval.modes import Target, load_mode
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions
from protos.node.environment import environment

ANSWER_TOKENS = 20  # an answer has 15
_ROOM = 256  # tokens kept for the question and the answer
_SHORTEST, _LONGEST = 1000, 1 << 20
_TRAINED = 4096  # positions the checkpoint was trained on


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Size of the document, and how the model attends."""

    tokens: int = 128_000
    needles: int = 8
    positions: str = "dca"  # dca and yarn stretch the trained window over the document; plain fails beyond it
    sparse: bool = True  # prompts beyond the threshold of the checkpoint select the keys they read
    seed: int = 0


class MemoryWatch(threading.Thread):
    """Samples the memory of this process and everything it started every `every_s` seconds while it is entered."""

    def __init__(self, every_s: float = 5.0) -> None:
        super().__init__(name="memory", daemon=True)
        self.peak_bytes = 0
        self._every_s = every_s
        self._stopped = threading.Event()

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        self.peak_bytes = tree_pss_bytes()
        while not self._stopped.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, tree_pss_bytes())


def tree_pss_bytes() -> int:
    """Return the bytes of this process and all its descendants (on Linux PSS: shared pages count once)."""
    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it ended meanwhile, or is not ours to look at
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


def demo_report(
    options: DemoOptions, haystack: Haystack, answers: Sequence[Generation], layout: tuple[int, int], ready_s: float,
    total_s: float, peak_memory_bytes: int, over_http: HttpAnswer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return answers beside the truth, and what the run cost, as plain data.

    `answer` is what the model said, `truth` what is in the document; an answer is right when it is exactly that.

    Args:
        peak_memory_bytes: of all processes together.
        over_http: the longest question, asked again over HTTP.
    """
    first = min(answers, key=lambda answer: answer.timings.ttft_s)
    decoded = sum(len(answer.token_ids) - 1 for answer in answers)
    ends = [answer.timings.ttft_s + answer.timings.decode_s for answer in answers]
    decoding = max(ends) - first.timings.ttft_s  # the later questions are read in this time, too
    questions = [
        {
            "question": needle.question,
            "truth": needle.answer.strip(),
            "answer": answer.text.strip(),
            "right": is_right(answer.text, needle),
            "depth": round(needle.depth, 3),
        }
        for needle, answer in zip(haystack.needles, answers, strict=True)
    ]
    return {
        "questions": questions,
        "right": sum(question["right"] for question in questions),
        "total": len(answers),
        "tokens": haystack.num_tokens,
        "positions": options.positions,
        "sparse": first.attention.to_json() if first.attention is not None else None,
        "stages": layout[0],
        "shards_per_stage": layout[1],
        "ready_s": round(ready_s, 2),
        "ttft_s": round(first.timings.ttft_s, 3),
        "prefill_tokens_per_s": round((first.prompt_tokens - first.cached_tokens) / first.timings.prefill_s, 1),
        "decode_tokens_per_s": round(decoded / decoding, 1) if decoding > 0 else None,
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "http": over_http.to_json() if over_http is not None else None,
        "total_s": round(total_s, 2),
        "peak_memory_bytes": peak_memory_bytes,
        "seed": options.seed,
        "environment": environment(),
    }


def demo_deployment(options: DemoOptions) -> Deployment:
    """Return the deployment of `configs/demo.yaml` for a document of `options.tokens`. Raises UserError."""
    if not _SHORTEST <= options.tokens <= _LONGEST:
        raise UserError(f"tokens: {options.tokens}: must be between {_SHORTEST} and {_LONGEST}")
    more: dict[str, object] = {"sparse.enabled": options.sparse}
    if options.positions != "dca":
        more["sparse.cell"] = _TRAINED  # a step holds it; dual chunk attention would have cut cells itself
    return load_mode(
        Target(configs_dir() / "demo.yaml"), options.positions, options.tokens + _ROOM,
        extra_tokens=options.needles * _TRAINED, more=more,  # every question computes its last cell itself
    )  # fmt: skip


def run_demo(options: DemoOptions, display: Display) -> dict[str, Any]:
    """Start the cluster, hide needles, ask for all of them, stop the cluster; return `demo_report`.

    Raises:
        UserError: options that cannot be. Whatever else starting and running a cluster raises.
    """
    began = time.monotonic()
    deployment = demo_deployment(options)
    runtime = ClusterRuntime(deployment, display.launch)
    haystack = build_haystack(runtime.tokenizer, options.tokens, options.needles, options.seed, needle_dir())
    questions = [needle.question for needle in haystack.needles]
    wanted = AnswerOptions(max_tokens=ANSWER_TOKENS)
    parallel = deployment.config.cluster
    layout = (parallel.pipeline_parallel_size, parallel.expert_parallel_size)
    with MemoryWatch() as memory, runtime:
        ready = time.monotonic() - began
        display.say(f"cluster ready in {ready:.1f} s: {layout[0]} stages x {layout[1]} shards")
        prompts = runtime.document_prompts(haystack.document, questions, wanted)
        last = max(range(len(prompts)), key=lambda index: len(prompts[index]))  # its length scale is all theirs
        answers = runtime.generate(prompts, wanted, display.reading(len(questions)), len(prompts[last]))
        again = None
        if can_serve_http():
            display.status("asking once more over HTTP")
            again = ask_over_http(runtime, prompts[last], answers[last].text, ANSWER_TOKENS)
    total = time.monotonic() - began
    return demo_report(options, haystack, answers, layout, ready, total, memory.peak_bytes, again)
