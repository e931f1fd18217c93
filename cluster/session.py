"""A running cluster with its tokenizer: documents and questions in, answers out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.block_pool import BlockPool
from cluster.config import Deployment
from cluster.door import HealthDoor
from cluster.engine import Engine, Event, Ticket
from cluster.generation import Generation, GenerationSpec
from cluster.launcher import Launched, Launcher, LaunchStatus
from cluster.preflight import compute_dtype
from cluster.prompts import build_document_prompts, check_length, opens_thinking
from cluster.scheduler import Scheduler
from cluster.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.messages import SamplingParams


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
        self._launcher = Launcher(deployment, on_status)
        self._engine: Engine | None = None
        self._door: HealthDoor | None = None
        self.launched: Launched | None = None

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the cluster and wait until it answers; whatever fails, nothing is left running."""
        config = self.deployment.config
        launched = self._launcher.start()
        try:
            root = cache_root(self.deployment, launched.fingerprint)
            prefill, page = config.prefill, config.kv_cache.page_size
            pool = BlockPool(launched.num_blocks)
            scheduler = Scheduler(pool, page, prefill.max_num_batched_tokens, prefill.max_num_seqs, root)
            self._engine = Engine(scheduler, launched.shards, self.tokenizer, self.deployment.spec.eos_token_ids)
            self._engine.start()
            if config.server.port:
                self._door = HealthDoor(config.server.host, config.server.port)
                self._door.start()
        except BaseException:
            self.close()
            raise
        self.launched = launched

    def close(self) -> None:
        """Stop in order: door, engine, actors, Ray; may be called twice."""
        if self._door is not None:
            self._door.close()
            self._door = None
        try:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
        finally:
            self._launcher.close()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the cluster is not running: call start() first")
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
    parts = (fingerprint, compute_dtype(deployment), repr(deployment.spec.rope))
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _for_index(on_event: Callable[[int, Event], None] | None, index: int) -> Callable[[Event], None]:
    if on_event is None:
        return lambda event: None
    return lambda event: on_event(index, event)

