"""A deployment that runs in this process: documents and questions in, answers out."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.common.errors import EngineError, StageError
from cluster.config.deployment import Deployment, load_deployment
from cluster.config.memory_budget import kv_dtype
from cluster.constraints.compiler import ConstraintCompiler
from cluster.constraints.thinking import closing_ids
from cluster.engine.attention_report import describe_positions, describe_sparsity
from cluster.engine.engine import Engine
from cluster.engine.outputs import Generation, GenerationSpec
from cluster.engine.pipeline import Pipeline, end_ids, launch_pipeline
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.engine.stage_split import balance_stages, launch_fitting
from cluster.engine.supervisor import PipelineSupervisor
from cluster.kv_store.store import KvStore
from cluster.latency.step_work import UNITS
from cluster.stages.ray_cluster import RayCluster
from cluster.text.chat_prompt import encode_chat
from cluster.text.chat_template import render_user_message
from cluster.text.gguf_tokenizer import tokenizer_file
from cluster.text.prompts import (
    Document,
    build_document_prompts,
    check_document,
    check_length,
    check_texts,
    encode_prompt,
)
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from cluster.text.tools.formats import ToolFormat, tool_format
from cluster.text.tools.grammar import tag_tokens, tool_grammar
from cluster.text.tools.prompt import template_messages, template_tools
from protos.errors import UserError
from protos.jobs.chat import ChatMessage, Tool, ToolChoice
from protos.jobs.sampling import AnswerOptions
from protos.node.environment import environment

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle
    from cluster.stages.launcher import Launched, LaunchStatus

OnEvent = Callable[[int, EngineEvent], None]  # index of a prompt, and what happened to it


class ClusterRuntime:
    """Runs one deployment; usable as a context manager.

    Failure contract: nothing is durable. A failed pipeline ends every question with EngineError; see
    `PipelineSupervisor` for who starts it again. `close` always cleans up.
    """

    def __init__(self, deployment: Deployment, on_status: Callable[[LaunchStatus], None] = lambda status: None) -> None:
        """Check the model's tokenizer, where there is one; `start` does the rest.

        Args:
            on_status: called at every start of the pipeline with what is being started.
        """
        self.deployment = balance_stages(deployment)  # the same at every launch of this runtime that fits
        model = deployment.config.model
        self._tokenizer_path, has_text = tokenizer_file(model.path)
        self.ids_only = not has_text  # prompts and answers are token ids, without text
        self._tokenizer = None if self.ids_only else TextTokenizer.open(model.path, model.chat_template)
        spec = deployment.spec
        self.constraints = ConstraintCompiler(self._tokenizer, spec.vocab_size, end_ids(spec, self._tokenizer))
        self.supervisor = PipelineSupervisor(self._launch)
        self.kv_store = KvStore(deployment.config.kv_store, deployment.kv_store_path is not None)
        self._ray = RayCluster(deployment.config.cluster.address)
        self._on_status = on_status

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the pipeline and wait until it answers; whatever fails, nothing is left running."""
        self.supervisor.start()

    def close(self) -> None:
        """Stop the pipeline and Ray; may be called twice."""
        self.supervisor.close()
        self._ray.close()

    def restart(self) -> None:
        """Stop what is left of a failed pipeline and start a new one; requests of the old one are lost."""
        self.close()
        self.start()

    def _launch(self) -> Pipeline:
        parts = self._tokenizer, self._ray, self._on_status, self.kv_store, self.constraints
        try:
            self.deployment, pipeline = launch_fitting(self.deployment, lambda given: launch_pipeline(given, *parts))
            return pipeline
        except BaseException:
            self._ray.close()  # the next attempt starts it anew: it may be the cause
            raise

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer; raises TokenizerError if it has none."""
        if self._tokenizer is None:
            raise TokenizerError(f"{self._tokenizer_path}: does not exist: text needs it; token ids go without")
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """The engine of the running pipeline; raises EngineError while there is none."""
        if (pipeline := self.supervisor.running) is None:
            raise EngineError("the cluster is not running: call start() first")
        return pipeline.engine

    @property
    def launched(self) -> Launched:
        """The newest stage processes, running or not; raises EngineError before the first start."""
        if (pipeline := self.supervisor.newest) is None:
            raise EngineError("the cluster is not running: call start() first")
        return pipeline.launched

    @property
    def max_model_len(self) -> int:
        """The tokens that a prompt and its answer may have together: of the deployment, as far as KV holds them."""
        longest = self.deployment.max_model_len
        if not self.deployment.limits_context or (pipeline := self.supervisor.newest) is None:
            return longest
        return min(longest, pipeline.launched.num_pages * self.deployment.config.kv_cache.page_size)

    def document_prompts(
        self, document: Document, questions: Sequence[str], options: AnswerOptions, now: datetime | None = None
    ) -> list[list[int]]:
        """Return prompts that share the document as their common prefix; the cluster need not run yet.

        Args:
            document: its text, or what returns its ids at a place of a prompt.
            now: what the clock of the chat template says in all of them; None reads the clock, once.

        Raises:
            PromptError: an empty document or question, or one that does not fit.
        """
        prompts = build_document_prompts(
            self.tokenizer, document, questions, self.deployment.config.model.document_prompt,
            enable_thinking=options.enable_thinking, max_model_len=self.max_model_len,
            max_tokens=options.max_tokens, now=now,
        )  # fmt: skip
        check_ids(options.stop_token_ids, self.deployment.spec.vocab_size, "stop_token_ids")
        return prompts

    def ask(
        self, document: str | os.PathLike[str], question: str, options: AnswerOptions | None = None,
        on_event: OnEvent | None = None,
    ) -> Generation:  # fmt: skip
        """Answer one question about a document: a text, or the path object of a UTF-8 file. Raises as `ask_all`."""
        return self.ask_all(document, [question], options, on_event)[0]

    def ask_all(
        self, document: str | os.PathLike[str], questions: Sequence[str], options: AnswerOptions | None = None,
        on_event: OnEvent | None = None, pinned_len: int = 0,
    ) -> list[Generation]:  # fmt: skip
        """Answer several questions about one document, which is computed once; results in their order.

        Args:
            pinned_len: length whose length scale (dual chunk attention) they use, so that later questions about the
                document, or about one that begins with it, share it; at least that of the longest prompt.
            on_event: called with the index of a question and its `PrefillProgress`, `OutputToken` or `Generation`; runs
                on the engine's thread and must not block.

        Raises:
            PromptError, DoesNotFit: before anything is computed. EngineError: the cluster failed.
        """
        options = options or AnswerOptions()
        text = document if isinstance(document, str) else self.check_document(Path(document).read_bytes())
        prompts = self.document_prompts(text, questions, options)
        return self.generate(prompts, options, on_event, max(pinned_len, longest(prompts)))

    def check_document(self, data: bytes) -> str:
        """Return the text of a document; raises PromptError for one that is empty, not UTF-8 or certainly too long."""
        return check_document(data, self.tokenizer, self.max_model_len)

    def chat_prompt(
        self, messages: Sequence[ChatMessage], options: AnswerOptions, now: datetime | None = None,
        tools: Sequence[Tool] = (), tool_choice: str | None = None,
    ) -> list[int]:  # fmt: skip
        """Return token ids of a conversation through the chat template.

        Args:
            tools, tool_choice: that the model may call.
            now: what the clock of the template says; None reads the clock.

        Raises:
            PromptError: messages that cannot fit. ChatTemplateError, RendererBusy: see `render_chat`.
        """
        limit = self.max_model_len
        check_texts([message.content for message in messages], self.tokenizer, limit, "conversation")
        return encode_chat(
            self.tokenizer, template_messages(messages), tools=template_tools(tools), tool_choice=tool_choice,
            enable_thinking=options.enable_thinking, now=now, max_model_len=limit,
        )  # fmt: skip

    @property
    def tool_format(self) -> ToolFormat:
        """The form of tool calls in the model's answers (`model.tool_parser`)."""
        template = self._tokenizer.chat_template if self._tokenizer is not None else None
        return tool_format(self.deployment.config.model.tool_parser, template)

    def call_grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, schema: Mapping[str, Any] | None = None
    ) -> str | None:
        """Return the grammar of an answer that the choice, a strict tool or a schema constrains; see `tool_grammar`."""
        return tool_grammar(self.tool_format, tools, choice, tag_tokens(self.tokenizer), schema) if tools else None

    def check_chat_template(self) -> None:
        """Render a message, so that a template that never can be is found before a start; raises ChatTemplateError."""
        if self._tokenizer is not None:
            render_user_message(self._tokenizer, "question", None)

    def text_prompt(self, text: str) -> list[int]:
        """Return token ids of a raw prompt, in which special tokens may be spelt; raises PromptError."""
        return encode_prompt(text, self.tokenizer, self.max_model_len)

    def reproducibility(
        self, options: AnswerOptions, prompts: Sequence[Sequence[int]], pinned_len: int = 0, kernel_family: str = ""
    ) -> dict[str, Any]:
        """Return what is needed to get the same tokens again for the prompts of one job.

        Args:
            pinned_len: length whose length scale its document has; a longer prompt counts more.
            kernel_family: kernels that computed KV that was imported with its document.
        """
        params = self.resolve(options).sampling_params
        config, spec, facts = self.deployment.config, self.deployment.spec, environment()
        return {
            "model": config.model.served_model_name,
            "fingerprint": self.launched.fingerprint,
            "positions": describe_positions(spec),
            "sparse_mode": describe_sparsity(spec),
            "dtype": self.launched.dtype,
            "kv_dtype": kv_dtype(self.deployment),
            "layout": f"{config.cluster.pipeline_parallel_size} x {config.cluster.expert_parallel_size}",
            "versions": {name: str(facts[name]) for name in ("version", "build", "torch", "ray", "python")}
            | ({"kernels": kernel_family} if kernel_family else {})
            | ({"tokenizer": "none"} if self.ids_only else {}),
            "seed": params.seed,
            "sampling": params.to_json(),
            "scale_len": max(pinned_len, longest(prompts)) if spec.dual_chunk is not None else 0,
        }

    @property
    def version(self) -> str:
        return importlib.metadata.version("longreach")

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages that requests own, 0 to 1."""
        pipeline = self.supervisor.running
        return pipeline.engine.scheduler.pool.usage if pipeline is not None else 0.0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds, 0 while no pipeline runs."""
        pipeline, page_size = self.supervisor.running, self.deployment.config.kv_cache.page_size
        return pipeline.engine.scheduler.pool.num_pages * page_size if pipeline is not None else 0

    @property
    def epoch(self) -> int:
        """Number of the newest pipeline over its processes: 1 when they are started, one more with each repair."""
        return self.supervisor.newest.launched.epoch if self.supervisor.newest is not None else 0

    @property
    def latency_coefficients(self) -> tuple[float, ...]:
        """Fitted cost of a step; see `LatencyModel`."""
        pipeline = self.supervisor.running
        return pipeline.engine.latency.coefficients if pipeline is not None else (0.0,) * len(UNITS)

    def status(self) -> dict[str, Any]:
        """Return sizes, use of KV, and the state of every shard."""
        config, newest = self.deployment.config, self.supervisor.newest
        return {
            "model": config.model.served_model_name,
            "max_model_len": self.max_model_len,
            "kv_usage": self.kv_usage,
            "kv_tokens": self.kv_tokens,
            "kv_store_bytes": self.kv_store.size_bytes,
            "kv_store_max_bytes": self.kv_store.max_bytes,
            "stages": [self._shard_status(shard) for shard in newest.launched.shards] if newest is not None else [],
            "version": self.version,
            "repairs": self.supervisor.num_repaired,
            "full_restarts": self.supervisor.num_restarted,
            "last_recovery_s": self.supervisor.last_recovery_s,
            "epoch": self.epoch,
        }

    def _shard_status(self, shard: GrpcStageHandle) -> dict[str, Any]:
        place = {"stage": shard.shard.stage, "rank": shard.shard.rank}
        if self.supervisor.running is None:
            return place | {"state": self.supervisor.state.value}
        try:
            reply = shard.probe()
        except StageError:
            return place | {"state": "unreachable"}
        return place | {
            "state": reply.state, "steps_done": reply.steps_done, "resident_bytes": reply.resident_bytes,
            "late": reply.late,
        }  # fmt: skip

    def check_prompts(self, prompts: Sequence[Sequence[int]], options: AnswerOptions) -> None:
        """Refuse prompts, stops and constraints this model cannot take (UserError); the cluster need not run yet."""
        check_ids(options.stop_token_ids, self.deployment.spec.vocab_size, "stop_token_ids")
        if options.stop and self.ids_only:
            raise UserError(f"stop: {options.stop[0]!r}: needs {self._tokenizer_path}: use stop_token_ids")
        check_ids([one.token_id for one in options.logit_bias], self.deployment.spec.vocab_size, "logit_bias")
        if options.thinking_budget is not None:
            if self.ids_only:
                raise UserError(f"thinking_budget: {options.thinking_budget}: needs {self._tokenizer_path}")
            closing_ids(self.tokenizer, options.thinking_budget, (), reasoning=False)
        if options.structured_outputs is not None:
            self.constraints.check(options.structured_outputs)
        for prompt in prompts:
            if not len(prompt):
                raise UserError("prompt: 0 tokens: must have at least one")
            check_length(len(prompt), options.max_tokens, self.max_model_len)
            check_ids(prompt, self.deployment.spec.vocab_size)

    def resolve(self, options: AnswerOptions) -> AnswerOptions:
        """Return the options with the model's defaults, and a fresh seed, for what they do not say."""
        return options.resolve(self.deployment.sampling)

    def generate(
        self, prompts: Sequence[Sequence[int]], options: AnswerOptions, on_event: OnEvent | None = None,
        pinned_len: int = 0,
    ) -> list[Generation]:  # fmt: skip
        """Continue token ids as they are; results in the order of the prompts. Arguments and errors as of `submit`."""
        handles = self.submit(prompts, options, on_event, pinned_len)
        try:
            return [handle.wait() for handle in handles]
        except BaseException:
            for handle in handles:
                self.engine.cancel(handle)
            raise

    def submit(
        self, prompts: Sequence[Sequence[int]], options: AnswerOptions, on_event: OnEvent | None = None,
        pinned_len: int = 0,
    ) -> list[RequestHandle]:  # fmt: skip
        """Queue prompts and return at once. Raises as `ask_all`.

        Args:
            pinned_len: length whose length scale (dual chunk attention) they use; 0: each its own.
        """
        self.check_prompts(prompts, options)
        options = self.resolve(options)
        items = []
        for index, prompt in enumerate(prompts):
            spec = GenerationSpec(prompt, options, question=index, pinned_len=pinned_len)
            items.append((spec, partial(on_event, index) if on_event is not None else lambda event: None))
        return self.engine.submit_all(items)


class LocalCluster(ClusterRuntime):
    """A cluster in this process, from a YAML file; loads neither ray nor torch before it is started.

    >>> with LocalCluster("configs/demo.yaml") as cluster:
    ...     answer = cluster.ask("... a long document ...", "What was decided?")
    ...     print(answer.text)
    """

    def __init__(self, config: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> None:
        """Check the configuration; `overrides` has dotted keys over it, such as `{"model.max_model_len": "128k"}`."""
        super().__init__(load_deployment(config, overrides))

    # named again so that the API reference, which leaves inherited members out, describes them
    start, close = ClusterRuntime.start, ClusterRuntime.close
    ask, ask_all = ClusterRuntime.ask, ClusterRuntime.ask_all


def longest(prompts: Sequence[Sequence[int]]) -> int:
    """Return the tokens of the longest prompt of a job: the length whose length scale all of them use."""
    return max(map(len, prompts))


def check_ids(prompt: Sequence[int], vocab_size: int, key: str = "token_ids") -> None:
    """Refuse ids outside the vocabulary (raises UserError naming the first and its position)."""
    if min(prompt, default=0) >= 0 and max(prompt, default=0) < vocab_size:
        return
    at = next(i for i, token in enumerate(prompt) if not 0 <= token < vocab_size)
    raise UserError(f"{key}: {prompt[at]} at index {at}: must be between 0 and {vocab_size - 1}")
