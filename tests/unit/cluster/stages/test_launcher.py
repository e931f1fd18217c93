"""What the launcher says of its progress."""

from __future__ import annotations

from cluster.stages.launcher import loaded_bytes
from protos.stage.messages import LoadProgress


def test_loaded_bytes_are_of_what_is_stored():
    """A quantised shard counts its weights while it loads; the last message has its bytes."""
    latest = [LoadProgress(0, 0), LoadProgress(50, 200), LoadProgress(130, 130, True)]
    assert loaded_bytes([100, 120, 128], latest) == 0 + 30 + 128
