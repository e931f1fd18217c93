"""Events of a device that note who waits for them."""

from __future__ import annotations


class Events:
    """Makes events that note their calls with their own number."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._made = 0

    def __call__(self) -> Events.One:
        self._made += 1
        return Events.One(self, self._made)

    class One:
        def __init__(self, owner: Events, number: int) -> None:
            self._owner, self._number = owner, number

        def record(self) -> None:
            self._owner.calls.append(("record", self._number))

        def synchronize(self) -> None:
            self._owner.calls.append(("wait", self._number))
