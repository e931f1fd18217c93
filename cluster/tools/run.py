"""One job from start to stop: `longreach run`. Everything about the input is checked before anything is started."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.client.ingest.source import read_source
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.text.prompts import PromptError, check_document, check_size
from cluster.tools.display import Display
from cluster.tools.token_ids import check_num_bytes, parse_token_ids
from protos.jobs.sampling import AnswerOptions


@dataclass(frozen=True, slots=True)
class RunInput:
    """What is asked. Exactly one of: a document with questions, a raw prompt, token ids."""

    document: Path | None = None
    questions: tuple[str, ...] = ()
    prompt_file: Path | None = None
    token_ids: Path | None = None

    def __post_init__(self) -> None:
        sources = [name for name in ("document", "prompt_file", "token_ids") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise PromptError("input: give one of --document (with --question), --prompt-file and --token-ids")
        if self.document is not None and not self.questions:
            raise PromptError("--document: needs at least one --question")
        if self.document is None and self.questions:
            raise PromptError("--question: needs a --document")


def run_once(config: Path, source: RunInput, ask: AnswerOptions, display: Display) -> dict[str, Any]:
    """Start the cluster of a YAML file, answer, stop it; return the report that `--json` prints.

    Token ids need no tokenizer: without the model's tokenizer.json the answer is token ids too, its `text` null.

    Raises:
        UserError: bad configuration, checkpoint or input; nothing was started. Otherwise as `ClusterRuntime`.
    """
    began = time.monotonic()
    with display:
        deployment = load_deployment(config, on_progress=display.amount)
        runtime = ClusterRuntime(deployment, display.launch)
        prompts = _prompts(runtime, source, ask, display)
        with runtime:
            ready = time.monotonic() - began
            results = runtime.generate(prompts, ask, display.reading(len(prompts)), longest(prompts))
    answers = [result.to_json(None if runtime.ids_only else runtime.tokenizer) for result in results]
    questions: Sequence[str | None] = source.questions or (None,)
    return {
        "model": deployment.config.model.served_model_name,
        "results": [
            {"question": question} | answer | ({"text": None} if runtime.ids_only else {})
            for question, answer in zip(questions, answers, strict=True)
        ],
        "timings": {"ready_s": round(ready, 2), "total_s": round(time.monotonic() - began, 2)},
    }


def _prompts(runtime: ClusterRuntime, source: RunInput, ask: AnswerOptions, display: Display) -> list[list[int]]:
    """Return the token ids of every prompt, checked against the model. Raises UserError."""
    path = source.document or source.prompt_file or source.token_ids
    assert path is not None
    limit = runtime.deployment.max_model_len
    tokenizer = None if source.token_ids is not None else runtime.tokenizer
    text, ids = "", []
    if source.document is not None:
        return runtime.document_prompts(_document(runtime, source.document, display), source.questions, ask)
    try:
        if tokenizer is None:
            check_num_bytes(path.stat().st_size, limit)
            ids = parse_token_ids(path.read_bytes())
        else:
            check_size(path.stat().st_size, tokenizer, limit, "prompt")  # before it is read
            text = check_document(path.read_bytes(), tokenizer, limit, "prompt")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PromptError(f"{path}: {error}") from error
    prompts = [ids if tokenizer is None else runtime.text_prompt(text)]
    runtime.check_prompts(prompts, ask)
    return prompts


def _document(runtime: ClusterRuntime, path: Path, display: Display) -> str:
    """Return the text of a file or folder. Raises UserError."""
    limit, tokenizer = runtime.deployment.max_model_len, runtime.tokenizer
    source = read_source(path)
    for note in source.notes:
        display.say(f"{path}: {note}")
    try:
        return check_document(source.data, tokenizer, limit)
    except ValueError as error:
        raise PromptError(f"{path}: {error}") from error
