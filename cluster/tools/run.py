"""One job from start to stop: `longreach run`. Everything about the input is checked before anything is started."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.deployment import load_deployment
from cluster.engine.runtime import Ask, Session
from cluster.text.chat_template import opens_thinking
from cluster.text.prompts import PromptError, check_document, check_size
from cluster.tools.display import Display


@dataclass(frozen=True, slots=True)
class RunInput:
    """Exactly one of: a document with questions, a raw prompt, token ids."""

    document: Path | None = None
    questions: tuple[str, ...] = ()
    prompt_file: Path | None = None
    token_ids: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("document", "prompt_file", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PromptError("input: give one of --document (with --question), --prompt-file and --token-ids")
        if self.document is not None and not self.questions:
            raise PromptError("--document: needs at least one --question")
        if self.document is None and self.questions:
            raise PromptError("--question: needs a --document")


def run_once(config: Path, given: RunInput, ask: Ask, display: Display) -> dict[str, Any]:
    """Start the cluster of a YAML file, answer, stop it; returns the report that `--json` prints.

    Raises:
        UserError: bad configuration, checkpoint or input; nothing was started. Otherwise as `Session`.
    """
    began = time.monotonic()
    deployment = load_deployment(config)
    with display:
        session = Session(deployment, display.launch)
        prompts = _prompts(session, given, ask)
        opened = given.document is not None and opens_thinking(session.tokenizer, ask.enable_thinking)
        with session:
            ready = time.monotonic() - began
            results = session.generate(prompts, ask, display.reading(len(prompts)), reasoning_opened=opened)
    questions: Sequence[str | None] = given.questions or (None,)
    return {
        "model": deployment.config.model.served_model_name,
        "results": [
            {"question": question} | result.to_json(session.tokenizer)
            for question, result in zip(questions, results, strict=True)
        ],
        "timings": {"ready_s": round(ready, 2), "total_s": round(time.monotonic() - began, 2)},
    }


def _prompts(session: Session, given: RunInput, ask: Ask) -> list[list[int]]:
    if given.document is not None:
        text = _read_text(given.document, session)
        return session.document_prompts(text, given.questions, ask)
    if given.prompt_file is not None:
        prompts = [session.tokenizer.encode(_read_text(given.prompt_file, session), add_special=True)]
    else:
        assert given.token_ids is not None
        prompts = [_read_ids(given.token_ids)]
    session.check_prompts(prompts, ask)
    return prompts


def _read_text(path: Path, session: Session) -> str:
    """A text file, refused by its size before it is read when no tokenisation could make it fit."""
    limit = session.deployment.max_model_len
    try:
        check_size(path.stat().st_size, session.tokenizer, limit)
        return check_document(path.read_bytes(), session.tokenizer, limit)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from error


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_bytes())
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}: not JSON ({error}): must be a list of token ids such as [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise PromptError(f"{path}: must be a JSON list of whole numbers such as [1, 2, 3]")
    return ids
