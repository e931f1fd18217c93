"""Members of a group as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


def run_members(size: int, member: Callable[[int], object]) -> list[object]:
    """Run `member` for every rank at the same time; what one raises takes the place of its result."""
    results: list[object] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = member(rank)
        except Exception as error:  # noqa: BLE001 - judged by the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a member hangs"
    return results
