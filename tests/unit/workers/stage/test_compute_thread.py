"""One thread computes, in order; errors reach the caller."""

import threading

import pytest

from workers.stage.compute_thread import ComputeThread


def test_calls_run_in_order_on_one_thread():
    compute = ComputeThread()
    seen: list[tuple[int, int]] = []
    futures = [compute.submit(lambda n=n: seen.append((n, threading.get_ident()))) for n in range(7)]
    for future in futures:
        future.result(10)
    assert [n for n, _ in seen] == list(range(7))
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_an_error_belongs_to_its_caller():
    compute = ComputeThread()
    broken = compute.submit(lambda: 1 // 0)
    assert compute.submit(lambda: 5).result(10) == 5
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
