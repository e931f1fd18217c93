"""Server-side errors: one family, each with its own exit code or message where it is caught."""

from __future__ import annotations

import signal

import pytest

from cluster.cli.common import EXIT_CLUSTER, one_line_errors
from cluster.common import errors
from protos.errors import UserError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_cluster_error_with_a_message_of_one_line(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert issubclass(kind, errors.ClusterError)
    assert not issubclass(kind, UserError), "bad input is not the cluster's failure"
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise kind("stage 0:\n gone")
    assert caught.value.code == EXIT_CLUSTER
    assert capsys.readouterr().err == "longreach: error: stage 0: gone\n"


def test_the_family_is_complete() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert names == {
        "ClusterError",
        "PreflightError",
        "PlacementError",
        "StageError",
        "EngineError",
        "JobStoreError",
        "JobStoreFull",
    }
