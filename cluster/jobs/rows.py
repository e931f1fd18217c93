"""Rows of the job store as objects. A damaged row is told, and harms no other.

SQLite keeps any value in any column, and a file may be damaged without SQLite noticing: every value is checked here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from cluster.common.text_format import one_line
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import (
    SCALE_TO_COME,
    DocumentRecord,
    JobAnswer,
    JobDamaged,
    JobInput,
    JobRecord,
    JobSpec,
    JobState,
    PromptToken,
)
from cluster.scheduler.request import FinishReason
from protos.jobs.limits import MAX_INT32, MAX_INT64, MAX_UINT32
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import TokenLogprob

_NO_OPTIONS = AnswerOptions()
_PROMPT = TypeAdapter(tuple[PromptToken, ...])
NO_SPEC = JobSpec(JobInput(token_ids=()), _NO_OPTIONS)  # of a job whose own cannot be read
_FINISH_REASONS = frozenset(reason.value for reason in FinishReason)
_PARTS = ("answer", "reasoning", "")  # "": stored by an earlier version, not split yet


class JobRow(NamedTuple):
    """What a query of jobs selects, in this order."""

    seq: int
    id: Any
    state: Any
    created: Any
    started: Any
    finished: Any
    error: Any
    last_event: Any
    restarts: Any
    num_answers: Any
    document_id: Any
    owner: Any
    priority: Any
    questions: Any
    reproducibility: Any


COLUMNS = ", ".join(name.replace("reproducibility", "summaries.reproducibility") for name in JobRow._fields)


def job_state(value: object) -> JobState:
    """Return a stored state; a job in an unknown one cannot go on."""
    return JobState(value) if value in _STATES else JobState.FAILED


_STATES = frozenset(state.value for state in JobState)


class _Reader:
    """Reads values of one row; the first one that cannot be read is `damage`, and has a default."""

    def __init__(self) -> None:
        self.damage = ""

    def count(self, name: str, value: object, most: int = MAX_INT64, least: int = 0) -> int:
        if isinstance(value, int) and least <= value <= most:
            return value
        self._note(name, value)
        return max(least, 0)

    def time(self, name: str, value: object) -> float:
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        self._note(name, value)
        return 0.0

    def text(self, name: str, value: object) -> str:
        if isinstance(value, str):
            return value
        self._note(name, value)
        return ""

    def mapping(self, name: str, value: object) -> Mapping[str, Any]:
        found = self._json(name, value)
        if isinstance(found, dict):
            return found
        self._note(name, value)
        return {}

    def texts(self, name: str, value: object) -> tuple[str, ...]:
        found = self._json(name, value)
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return tuple(found)
        self._note(name, value)
        return ()

    def offsets(self, name: str, value: object) -> tuple[int, ...]:
        found = self._json(name, value)
        offsets: list[Any] = found if isinstance(found, list) else [0]
        if all(isinstance(one, int) and one > 0 for one in offsets) and offsets == sorted(set(offsets)):
            return tuple(offsets)
        self._note(name, value)
        return ()

    def prompt(self, name: str, value: object) -> tuple[PromptToken, ...]:
        if value == "[]":
            return ()
        try:
            return _PROMPT.validate_json(self.text(name, value))
        except ValueError:
            self._note(name, value)
            return ()

    def spec(self, value: object) -> JobSpec:
        try:
            spec = JobSpec.from_json(value)  # type: ignore[arg-type]  # what is no text raises too
            if not -MAX_INT32 - 1 <= spec.priority <= MAX_INT32:
                raise ValueError(f"priority {spec.priority}")
            return spec
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is wrong with this job alone
            self.damage = self.damage or f"spec: {one_line(error, 200)}"
            return NO_SPEC

    def _json(self, name: str, value: object) -> object:
        try:
            return json.loads(self.text(name, value))
        except (ValueError, RecursionError):
            return None

    def _note(self, name: str, value: object) -> None:
        self.damage = self.damage or f"{name}: {str(value)[:40]!r}"


def job_record(row: JobRow, answers: Sequence[Sequence[Any]], spec: object) -> JobRecord:
    """Return a job with the whole spec; what cannot be read of it has a default and is told in `damage`."""
    reader = _Reader()
    found = reader.spec(spec)
    if not reader.damage and found.input.num_answers != row.num_answers:
        reader.count("num_answers", row.num_answers, found.input.num_answers, found.input.num_answers)
    return _record(reader, row, answers, found)


def listed_record(row: JobRow, answers: Sequence[Sequence[Any]], labels: Mapping[Any, Any]) -> JobRecord:
    """Return a job as listings show it, without reading its spec: that has labels, priority and questions only."""
    reader = _Reader()
    questions = () if row.questions is None else reader.texts("questions", row.questions)
    count = reader.count("num_answers", row.num_answers, 1 << 20, 1)
    source = JobInput(token_ids=())
    if row.document_id is not None:
        shown = (questions + ("",) * count)[:count]
        document_id = reader.text("document_id", row.document_id) or "?"
        is_read = row.questions is not None and not reader.damage and not questions and count == 1
        source = JobInput(document_id, () if is_read else shown, read=is_read)
    pairs = {reader.text("label", key): reader.text("label", value) for key, value in labels.items()}
    priority = reader.count("priority", row.priority, MAX_INT32, -MAX_INT32 - 1)
    return _record(reader, row, answers, JobSpec(source, _NO_OPTIONS, priority, labels=pairs))


def _record(reader: _Reader, row: JobRow, answers: Sequence[Sequence[Any]], spec: JobSpec) -> JobRecord:
    state = job_state(row.state)
    if row.state != state.value:
        reader.damage = reader.damage or f"state: {str(row.state)[:40]!r}"
    values = {
        "created": reader.time("created", row.created),
        "started": None if row.started is None else reader.time("started", row.started),
        "finished": None if row.finished is None else reader.time("finished", row.finished),
        "last_event": reader.count("last_event", row.last_event),
        "restarts": reader.count("restarts", row.restarts, MAX_UINT32),
        "reproducibility": reader.mapping("reproducibility", row.reproducibility),
        "answers": tuple(_answer(reader, values) for values in answers),
        "owner": reader.text("owner", row.owner),
    }
    error = reader.text("error", row.error)
    damage = reader.damage and f"the stored job is damaged: {reader.damage}"
    return JobRecord(id=str(row.id), state=state, spec=spec, error=error or damage, damage=damage, **values)  # type: ignore[arg-type]


def _answer(reader: _Reader, row: Sequence[Any]) -> JobAnswer:
    """Return an answer from its columns, which are the fields of JobAnswer."""
    question, prompt_tokens, cached_tokens, finish_reason, text, reasoning, timings, attention, prompt = row
    reason = reader.text("finish_reason", finish_reason)
    if reason and reason not in _FINISH_REASONS:
        reader.damage = reader.damage or f"finish_reason: {reason[:40]!r}"
        reason = ""
    seconds = reader.mapping("timings", timings)
    if not all(isinstance(value, (int, float)) for value in seconds.values()):
        reader.damage = reader.damage or f"timings: {str(timings)[:40]!r}"
        seconds = {}
    return JobAnswer(
        question=reader.count("question", question, MAX_INT32),
        prompt_tokens=reader.count("prompt_tokens", prompt_tokens, MAX_UINT32),
        cached_tokens=reader.count("cached_tokens", cached_tokens, MAX_UINT32),
        finish_reason=reason,
        text=reader.text("text", text),
        reasoning=None if reasoning is None else reader.text("reasoning", reasoning),
        timings=seconds,
        attention=reader.mapping("attention", attention),
        prompt=reader.prompt("prompt", prompt),
    )


def token(job_id: str, number: int, row: Sequence[Any]) -> OutputToken:
    """Return the token that must have this number, from its columns. Raises JobDamaged."""
    stored, question, token_id, text, logprob, top, part, reasoning, answer = row
    try:
        tops = () if top == "[]" else tuple(TokenLogprob(*entry) for entry in json.loads(top))
        is_right = (
            stored == number
            and _is_count(question) and _is_count(token_id)
            and all(isinstance(one, str) for one in (text, reasoning, answer)) and part in _PARTS
            and (logprob is None or isinstance(logprob, float))
            and all(_is_count(one.token_id) and isinstance(one.logprob, (int, float)) for one in tops)
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError):
        is_right = False
    if not is_right:
        raise JobDamaged(f"job {job_id}: its stored token {number} is missing or damaged: submit it again")
    return OutputToken(number, question, token_id, text, logprob, tops, part, reasoning, answer)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_UINT32


def document_record(row: Sequence[Any]) -> DocumentRecord:
    """Return a document; of a damaged row the size is 0, so that its file is not taken for what was uploaded."""
    reader = _Reader()
    document_id, name, size, created, expires, tokens, scale_len, pinned, used, parent, source, family = row[:12]
    owner, shared, purpose, seams = row[12:]
    record = DocumentRecord(
        id=str(document_id),
        name=reader.text("name", name),
        size_bytes=reader.count("size_bytes", size),
        created=reader.time("created", created),
        expires=reader.time("expires", expires),
        tokens=reader.count("tokens", tokens, MAX_UINT32),
        scale_len=reader.count("scale_len", scale_len, MAX_UINT32, SCALE_TO_COME),
        pinned=bool(reader.count("pinned", pinned, 1)),
        used=reader.time("used", used),
        parent=reader.text("parent", parent),
        source_hash=reader.text("source_hash", source),
        kernel_family=reader.text("kernel_family", family),
        owner=reader.text("owner", owner),
        shared=bool(reader.count("shared", shared, 1)),
        purpose=reader.text("purpose", purpose),
        seams=reader.offsets("seams", seams),
    )
    return replace(record, name=record.name or "(damaged record)", size_bytes=0) if reader.damage else record
