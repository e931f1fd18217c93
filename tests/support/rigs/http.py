"""The HTTP application over a job service in memory: called directly, or served on a loopback port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from cluster.access.call_pool import CallPool
from cluster.access.keys import Keys
from cluster.config.schema import SecuritySection, ServerSection
from cluster.engine.outputs import OutputToken
from cluster.http.app import make_app
from cluster.http.core.backend import Backend
from cluster.http.http_server import HttpServer
from cluster.jobs.model import JobAnswer, JobRecord, JobSpec, JobState
from cluster.jobs.subscriptions import JobEvent
from cluster.jobs.tenants.tenant import ANYONE, Tenant
from cluster.server.head import Head
from cluster.text.chat_prompt import encode_chat
from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.formats import ToolFormat
from cluster.text.tools.grammar import tool_grammar
from cluster.text.tools.prompt import template_messages, template_tools
from protos.jobs.chat import ToolChoice
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import NEEDLE, free_port
from tests.support.rigs.service import Bench

TEAM_KEY = "0123456789abcdef"
WORDS = ("The ", "answer ", "is ", "forty", "-two", ".")


class AnsweringService(FakeJobService):
    """Jobs answer with the texts of `reasoning`, then `words`; a stream tells of them after its first progress.

    Attributes:
        specs: what was submitted.
        outcome: how jobs end.
    """

    def __init__(self, words: tuple[str, ...] = WORDS, reasoning: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.problem = ""
        self.is_draining = False
        self.specs: list[JobSpec] = []
        self.key_names: list[str] = []
        self.outcome = JobState.SUCCEEDED
        self.finish_reason = "stop"
        thought = [OutputToken(n, 0, 40 + n, text, -0.5, (), "reasoning", text) for n, text in enumerate(reasoning, 1)]
        at = len(thought)
        said = [
            OutputToken(at + n, 0, 60 + n, text, -0.25, ((60 + n, -0.25), (7, -2.0)), "answer", "", text)
            for n, text in enumerate(words, 1)
        ]
        self.output = [*thought, *said]
        self.events = [[token] for token in self.output]

    def submit(self, spec: JobSpec, tenant: Tenant = ANYONE) -> JobRecord:
        self.specs.append(spec)
        self.key_names.append(tenant.name)
        return super().submit(spec, tenant)

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> list[OutputToken]:
        return self.output[after : min(after + limit, self.get(job_id).last_event)]

    def _events(self, job_id: str, after: int) -> Iterator[JobEvent]:
        for event in super()._events(job_id, after):
            endless = isinstance(event, list) and self.endless
            yield [replace(token, answer=token.text) for token in event] if endless else event

    def finish(self, job_id: str) -> JobRecord:
        answer = JobAnswer(0, 17, 5, self.finish_reason, "".join(t.answer for t in self.output))
        error = "the pipeline broke" if self.outcome is JobState.FAILED else ""
        last = len(self.output)
        record = replace(
            self.get(job_id), state=self.outcome, finished=3.0, last_event=last, answers=(answer,), error=error
        )
        self.records[job_id] = record
        return record


@cache
def needle_tokenizer() -> TextTokenizer:
    """The tokenizer of the demonstration model, with its chat template."""
    return TextTokenizer.open(NEEDLE)


def fake_runtime(**changes: object) -> Any:
    """A runtime with a tokenizer and nothing else."""
    tokenizer = needle_tokenizer()

    def chat_prompt(messages: Any, options: Any, tools: Any = (), tool_choice: str | None = None) -> list[int]:
        return encode_chat(
            tokenizer, template_messages(messages), tools=template_tools(tools), tool_choice=tool_choice,
            enable_thinking=options.enable_thinking,
        )  # fmt: skip

    def call_grammar(tools: Any, choice: ToolChoice, schema: Any = None) -> str | None:
        return tool_grammar(ToolFormat.QWEN3_JSON, tools, choice, schema=schema)

    model = SimpleNamespace(served_model_name="needle")
    config = SimpleNamespace(model=model)
    spec = SimpleNamespace(vocab_size=tokenizer.vocab_size)
    return SimpleNamespace(
        tokenizer=tokenizer, max_model_len=4096, version="1.2.3", chat_prompt=chat_prompt,
        tool_format=ToolFormat.QWEN3_JSON, call_grammar=call_grammar,
        text_prompt=lambda text: tokenizer.encode(text, add_special=True),
        deployment=SimpleNamespace(config=config, spec=spec), kv_store=SimpleNamespace(block_tokens=4), **changes,
    )  # fmt: skip


def make_backend(service: Any, **limits: object) -> Backend:
    """A backend over a service in memory; `limits` are keys of the section `server`."""
    section = ServerSection(**limits)  # type: ignore[arg-type]
    streams = CallPool(section.max_streams, "server.max_streams")
    return Backend(service, fake_runtime(), section, streams, lambda: b"longreach_jobs_total 1\n")


@contextlib.contextmanager
def direct_client(service: Any, keys: Keys | None = None, **limits: object) -> Iterator[httpx.AsyncClient]:
    """A client that calls the application in its own event loop."""
    backend = make_backend(service, **limits)
    transport = httpx.ASGITransport(make_app(backend, keys), client=("127.0.0.1", 4711))
    try:
        yield httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    finally:
        backend.close()


@contextlib.contextmanager
def bench_backend(folder: Path) -> Iterator[Backend]:
    """A backend over a whole job service, whose pipeline is a fake."""
    bench, limits = Bench(folder), ServerSection()
    made = Backend(bench.service, bench.runtime, limits, CallPool(limits.max_streams, "server.max_streams"))
    yield made
    made.close()
    bench.close()


def post(backend: Backend, path: str, **body: Any) -> httpx.Response:
    """Call a route in an event loop of its own."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(backend, None), client=("127.0.0.1", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.post(path, json=body, timeout=60)

    return asyncio.run(run())


@contextlib.contextmanager
def serving_http(
    service: Any, keys: Keys | None = None, security: SecuritySection | None = None, **limits: object
) -> Iterator[str]:
    """A server on a free port; yields its URL."""
    server = HttpServer(make_backend(service, **limits), security or SecuritySection(), keys, port=0)
    url = server.start()
    try:
        yield url
    finally:
        server.close(0.0)


class HeadOverHttp:
    """A whole head over a fake shard, with a port for HTTP."""

    def __init__(self, folder: Path, **server: object) -> None:
        self.runtime = FakeRuntime(folder, http_port=free_port(), **server)
        self.runtime.start()
        self.head = Head(self.runtime.deployment, runtime=self.runtime)
        self.head.start()
        self.url = self.head.service.http_url

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30)

    def close(self) -> None:
        self.head.close()
        self.runtime.close()
