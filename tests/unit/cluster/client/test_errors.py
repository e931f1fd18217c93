"""Errors of the clients: one line each, and what a caller may catch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

import cluster
from cluster.client import errors
from cluster.client.models import BaseJob
from protos.errors import UserError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LongreachError)]


def test_the_package_exports_every_error() -> None:
    assert len(KINDS) == 9
    assert all(getattr(cluster, kind.__name__) is kind for kind in KINDS)


def test_only_a_wrong_request_is_the_users_to_mend() -> None:
    assert [kind for kind in KINDS if issubclass(kind, UserError)] == [errors.InvalidRequest]
    assert issubclass(errors.InvalidRequest, ValueError)


@pytest.mark.parametrize(
    ("state", "error", "line"),
    [("failed", "no pages", "job_1: failed: no pages"), ("cancelled", "", "job_1: cancelled")],
)
def test_a_failed_job_says_why(state: str, error: str, line: str) -> None:
    job = cast(BaseJob, SimpleNamespace(id="job_1", state=state, error=error))
    failure = errors.JobFailed(job)
    assert str(failure) == line
    assert failure.job is job


def test_busy_keeps_the_seconds() -> None:
    failure = errors.Busy("the queue is full", 1.5)
    assert (str(failure), failure.retry_after_s) == ("the queue is full", 1.5)
