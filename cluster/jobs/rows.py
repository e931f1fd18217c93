"""Rows of the job store as objects; a damaged row is told, and harms no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.common.text_format import one_line
from cluster.jobs.model import JobAnswer, JobInput, JobRecord, JobSpec, JobState
from protos.errors import InvalidRequest
from protos.jobs.sampling import AnswerOptions

_NO_SPEC = JobSpec(JobInput(token_ids=()), AnswerOptions())  # of a job whose own cannot be read
_FIGURES = ("created", "started", "finished", "error", "last_event", "restarts")


def job_record(row: Sequence[Any], answers: Sequence[Sequence[Any]]) -> JobRecord:
    """Return a job; what cannot be read of it is left out and said, so that others can be read beside it."""
    _, job_id, state, *values, spec, reproducibility = row
    figures = dict(zip(_FIGURES, values, strict=True))
    try:
        return JobRecord(
            id=job_id,
            state=JobState(state),
            spec=JobSpec.from_json(spec),
            **figures,
            answers=tuple(JobAnswer(*answer[:-2], *map(json.loads, answer[-2:])) for answer in answers),
            reproducibility=json.loads(reproducibility),
        )
    except (ValueError, TypeError, RecursionError, InvalidRequest) as error:
        damage = f"the row of the job is damaged: {one_line(error, 200)}"
    known = JobState(state) if state in list(JobState) else JobState.FAILED
    figures["error"] = figures["error"] or damage
    return JobRecord(id=job_id, state=known, spec=_NO_SPEC, **figures, damage=damage)
