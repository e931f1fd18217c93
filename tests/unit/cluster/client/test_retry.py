"""Pauses between tries."""

from __future__ import annotations

from cluster.client.retry import RetryPolicy


def test_backoff_grows_and_is_bounded() -> None:
    policy = RetryPolicy(attempts=6, first_s=1.0, largest_s=4.0)
    for _ in range(20):
        delays = list(policy.delays())
        assert len(delays) == 5
        for delay, most in zip(delays, (1, 2, 4, 4, 4), strict=True):
            assert most / 2 <= delay <= most
    assert list(RetryPolicy(attempts=1).delays()) == []


def test_very_many_attempts() -> None:
    delays = list(RetryPolicy(attempts=2000, first_s=0.1, largest_s=5.0).delays())
    assert len(delays) == 1999
    assert max(delays) <= 5.0
