"""Repeats of one measurement: medians and spread, with a mark on those that other programs disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.bench.speed.machine import LoadOfOthers

Values = Mapping[str, Any]  # the figures of one run; those that are numbers get a median
Name = TypeVar("Name")  # of an engine
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often something is measured.

    Attributes:
        count: repeats without disturbance that are wanted.
        retries: further repeats for those that were disturbed.
        max_others: share of the cores that others may use before a repeat counts as disturbed.
    """

    count: int = 3
    retries: int = 0
    max_others: float = 0.05

    def run(
        self, measure: Callable[[int], Values], load: LoadOfOthers, on_repeat: Callable[[int], object] = lambda n: None
    ) -> list[dict[str, Any]]:
        """Call `measure` with 0, 1, ... and return what it gives, with `others` and `disturbed` of each repeat."""
        return self.run_in_turns({"": measure}, load, on_repeat)[""]

    def run_in_turns(
        self, engines: Mapping[Name, Callable[[int], Values]], load: LoadOfOthers,
        on_repeat: Callable[[int], object] = lambda n: None,
    ) -> dict[Name, list[dict[str, Any]]]:  # fmt: skip
        """Measure engines one after the other in every repeat, so that what disturbs the machine disturbs all.

        Args:
            engines: by name what measures one; it may say itself how much of the cores `others` used meanwhile.
            on_repeat: called before each repeat with its number.
        """
        runs: dict[Name, list[dict[str, Any]]] = {name: [] for name in engines}
        for number in range(self.count + self.retries):
            if all(sum(not run["disturbed"] for run in done) >= self.count for done in runs.values()):
                break
            on_repeat(number)
            for name, measure in engines.items():
                mark = load.mark()
                values = dict(measure(number))
                others = values.get("others", load.since(mark))
                values["others"] = round(others, 4)
                values["disturbed"] = others > self.max_others
                runs[name].append(values)
        return runs


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return median, smallest, largest value and median absolute deviation of every figure of repeats.

    Disturbed repeats count only where no other is left, which `all_disturbed` says. The runs themselves are kept.
    """
    quiet = [run for run in runs if not run["disturbed"]]
    counted = quiet or list(runs)
    names = [
        name for name, value in runs[0].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "others"
    ] if runs else []  # fmt: skip
    return {
        "figures": {name: spread([run[name] for run in counted if run.get(name) is not None]) for name in names},
        "repeats": len(runs),
        "disturbed": len(runs) - len(quiet),
        "all_disturbed": bool(runs) and not quiet,
        "others_max": max((run["others"] for run in runs), default=0.0),
        "runs": [dict(run) for run in runs],
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, min, max and median absolute deviation."""
    known = list(values)
    median = statistics.median(known)
    deviation = statistics.median(abs(value - median) for value in known)
    named = {"median": median, "min": min(known), "max": max(known), "mad": deviation}
    return {name: round(float(value), _DIGITS) for name, value in named.items()}


def figure(row: Mapping[str, Any], name: str) -> float | None:
    """Return the median of a figure of a row; None where it was not measured."""
    found = row.get("figures", {}).get(name)
    return None if found is None else float(found["median"])
