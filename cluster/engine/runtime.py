"""A running cluster with its tokenizer: documents and questions in, answers out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.common.environment import environment
from cluster.common.errors import EngineError, StageError
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import compute_dtype, kv_dtype
from cluster.engine.attention_report import describe_positions, describe_sparsity
from cluster.engine.engine import Engine
from cluster.engine.hang_detector import FLOOR_S, Watchdog
from cluster.engine.outputs import Generation, GenerationSpec
from cluster.engine.request_handle import Event, Ticket
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.stages.launcher import Launched, Launcher, LaunchStatus
from cluster.text.chat_template import opens_thinking, render_chat
from cluster.text.prompts import build_document_prompts, check_document, check_length
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.stage.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """How to answer: the same for every question of a call."""

    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens}: must be at least 1")
        if not all(self.stop):
            raise UserError('stop: "": a stop string must have at least one character')


class Session:
    """One deployment from start to stop; usable as a context manager.

    Failure contract: nothing is durable. A lost shard ends every question with EngineError; `close` always cleans up.
    """

    def __init__(self, deployment: Deployment, on_status: Callable[[LaunchStatus], None] = lambda status: None) -> None:
        self.deployment = deployment
        self.tokenizer = TextTokenizer.open(deployment.config.model.path)
        self._on_status = on_status
        self._launcher = Launcher(deployment, on_status)
        self._engine: Engine | None = None
        self.launched: Launched | None = None
        self.hung_after_s = FLOOR_S
        self._watchdog: Watchdog | None = None
        self.on_broken: Callable[[Callable[[], str]], None] = lambda report: None  # from the engine's thread

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the cluster and wait until it answers; whatever fails, nothing is left running."""
        config = self.deployment.config
        self.launched = launched = self._launcher.start()
        try:
            root = cache_root(self.deployment, launched.fingerprint)
            prefill, page_size = config.prefill, config.kv_cache.page_size
            pool = PagePool(launched.num_pages)
            scheduler = Scheduler(
                pool, page_size, prefill.max_num_batched_tokens, prefill.max_num_seqs, root, spec=self.deployment.spec,
                num_stages=config.cluster.pipeline_parallel_size,
            )  # fmt: skip
            self._begin(Engine(scheduler, launched.shards, self.tokenizer, self.deployment.spec.eos_token_ids))
        except BaseException:
            self.close()
            raise

    def _begin(self, engine: Engine) -> None:
        """Work with this engine from now on; a report about an earlier one is void."""
        self._engine = engine
        engine.on_broken = lambda error: self.on_broken(lambda: error if self._engine is engine else "")
        engine.start()
        if self.launched is not None:
            self._watchdog = Watchdog(engine, self.launched.shards, self.hung_after_s)
            self._watchdog.start()

    def close(self) -> None:
        """Stop in order: engine, actors, Ray; may be called twice."""
        try:
            if self._watchdog is not None:
                self._watchdog.close()
                self._watchdog = None
            if self._engine is not None:
                self._engine.close()
                self._engine = None
        finally:
            self._launcher.close()

    def restart(self) -> None:
        """Stop what is left of a broken cluster and start a new one; requests of the old one are lost."""
        self.close()
        self._launcher = Launcher(self.deployment, self._on_status)
        self.start()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise EngineError("the cluster is not running: call start() first")
        return self._engine

    def document_prompts(self, document: str, questions: Sequence[str], ask: Ask) -> list[list[int]]:
        """Prompts that share the document as their common beginning; the cluster need not run yet.

        Raises:
            PromptError: an empty document or question, or one that does not fit.
        """
        prompts = build_document_prompts(
            self.tokenizer, document, questions, self.deployment.config.model.document_prompt,
            enable_thinking=ask.enable_thinking, max_model_len=self.deployment.max_model_len,
            max_tokens=ask.max_tokens,
        )  # fmt: skip
        check_ids(ask.stop_token_ids, self.deployment.spec.vocab_size, "stop_token_ids")
        return prompts

    def ask_document(
        self, document: str, questions: Sequence[str], ask: Ask, on_event: Callable[[int, Event], None] | None = None
    ) -> list[Generation]:
        """Answer several questions about one document; it is computed once.

        Args:
            on_event: called with the index of the question, on the engine's thread; must not block.

        Raises:
            PromptError, DoesNotFit: before anything is computed. EngineError: the cluster failed.
        """
        prompts = self.document_prompts(document, questions, ask)
        opened = opens_thinking(self.tokenizer, ask.enable_thinking)
        return self.generate(prompts, ask, on_event, reasoning_opened=opened)

    def check_document(self, data: bytes) -> str:
        """The text of a document; raises PromptError when it is empty, not UTF-8 or too long whatever its tokens."""
        return check_document(data, self.tokenizer, self.deployment.max_model_len)

    def chat_prompt(self, messages: Sequence[tuple[str, str]], ask: Ask) -> list[int]:
        """Token ids of (role, content) messages through the chat template; raises ChatTemplateError."""
        conversation = [{"role": role, "content": content} for role, content in messages]
        text = render_chat(self.tokenizer, conversation, enable_thinking=ask.enable_thinking)
        return self.tokenizer.encode(text)

    def reproducibility(self, seed: int) -> dict[str, Any]:
        """What is needed to get the same tokens again."""
        assert self.launched is not None
        config, spec, facts = self.deployment.config, self.deployment.spec, environment()
        return {
            "model": config.model.served_model_name,
            "fingerprint": self.launched.fingerprint,
            "positions": describe_positions(spec),
            "sparse_mode": describe_sparsity(spec),
            "dtype": self.launched.dtype,
            "kv_dtype": kv_dtype(self.deployment),
            "layout": f"{config.cluster.pipeline_parallel_size} x {config.cluster.expert_parallel_size}",
            "versions": {name: str(facts[name]) for name in ("version", "build", "torch", "ray", "python")},
            "seed": seed,
        }

    @property
    def version(self) -> str:
        return importlib.metadata.version("longreach")

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages some request owns, 0..1."""
        return self.engine.scheduler.pool.usage if self._engine is not None else 0.0

    @property
    def latency_coefficients(self) -> tuple[float, float, float, float]:
        """The fitted cost of a step; see `LatencyModel`."""
        return self.engine.latency.coefficients if self._engine is not None else (0.0, 0.0, 0.0, 0.0)

    def status(self) -> dict[str, Any]:
        """The cluster as it is now: sizes, use of KV, and every shard's state."""
        launched, config = self.launched, self.deployment.config
        pages = self._engine.scheduler.pool.num_pages if self._engine is not None else 0  # none while it restarts
        stages = []
        for handle in launched.shards if launched else ():
            entry: dict[str, Any] = {"stage": handle.shard.stage, "rank": handle.shard.rank, "state": "unreachable"}
            with contextlib.suppress(StageError):
                reply = handle.probe()
                entry |= {
                    "state": reply.state, "steps_done": reply.steps_done, "resident_bytes": reply.resident_bytes,
                }  # fmt: skip
            stages.append(entry)
        return {
            "model": config.model.served_model_name,
            "max_model_len": self.deployment.max_model_len,
            "kv_usage": self.kv_usage,
            "kv_tokens": pages * config.kv_cache.page_size,
            "stages": stages,
            "version": self.version,
        }

    def check_prompts(self, prompts: Sequence[Sequence[int]], ask: Ask) -> None:
        """Refuse prompts and stops this model cannot take (UserError); the cluster need not run yet."""
        check_ids(ask.stop_token_ids, self.deployment.spec.vocab_size, "stop_token_ids")
        for prompt in prompts:
            if not len(prompt):
                raise UserError("prompt: 0 tokens: must have at least one")
            check_length(len(prompt), ask.max_tokens, self.deployment.max_model_len)
            check_ids(prompt, self.deployment.spec.vocab_size)

    def generate(
        self, prompts: Sequence[Sequence[int]], ask: Ask, on_event: Callable[[int, Event], None] | None = None,
        reasoning_opened: bool = False,
    ) -> list[Generation]:  # fmt: skip
        """Continue token ids as they are; results in the order of the prompts. Raises as `ask_document`."""
        tickets = self.submit(prompts, ask, on_event, reasoning_opened)
        try:
            return [ticket.wait() for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                self.engine.cancel(ticket)
            raise

    def submit(
        self, prompts: Sequence[Sequence[int]], ask: Ask, on_event: Callable[[int, Event], None] | None = None,
        reasoning_opened: bool = False,
    ) -> list[Ticket]:  # fmt: skip
        """Queue prompts and return at once. Raises as `ask_document`."""
        self.check_prompts(prompts, ask)
        items = []
        for index, prompt in enumerate(prompts):
            spec = GenerationSpec(
                prompt, ask.max_tokens, ask.sampling, ask.stop, ask.stop_token_ids, ask.ignore_eos, reasoning_opened
            )
            items.append((spec, _for_index(on_event, index)))
        return self.engine.submit_all(items)


def check_ids(prompt: Sequence[int], vocab_size: int, key: str = "token_ids") -> None:
    """Refuse ids outside the vocabulary (raises UserError naming the first and its position)."""
    if min(prompt, default=0) >= 0 and max(prompt, default=0) < vocab_size:
        return
    at = next(i for i, token in enumerate(prompt) if not 0 <= token < vocab_size)
    raise UserError(f"{key}: {prompt[at]} at index {at}: must be between 0 and {vocab_size - 1}")


def cache_root(deployment: Deployment, fingerprint: str) -> bytes:
    """What the content of a KV page depends on besides its tokens."""
    spec = deployment.spec
    kv, positions = (compute_dtype(deployment), kv_dtype(deployment)), (spec.rope, spec.dual_chunk, spec.sparse)
    parts = (fingerprint, *kv, *map(repr, positions))
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _for_index(on_event: Callable[[int, Event], None] | None, index: int) -> Callable[[Event], None]:
    if on_event is None:
        return lambda event: None
    return lambda event: on_event(index, event)
