"""Result files that a report is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.tools.eval.results import read_json
from protos.errors import UserError

KINDS = ("bench prefill", "bench decode", "bench scaling", "bench compare", "recall")
_NEEDED = {"recall": ("variants", "tokens", "model")}
_NEEDED_OF_BENCH = ("rows", "machine", "config", "environment")


@dataclass(frozen=True, slots=True)
class Result:
    """One result file."""

    path: Path
    report: Mapping[str, Any]

    @property
    def what(self) -> str:
        return str(self.report["what"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.report.get("rows", []))

    @property
    def model(self) -> str:
        model = self.report.get("model", {})
        return str(model.get("name", "?") if isinstance(model, Mapping) else model)

    @property
    def machine(self) -> str:
        """Return processor and cores, and whether it has AMX."""
        machine = self.report.get("machine")
        if machine is None:
            where = self.report.get("environment", {})
            return f"{where.get('cpu', 'unknown')}, {where.get('cores', '?')} cores"
        kind = "AMX" if machine["has_amx"] else "no AMX"
        return f"{machine['processor']} ({kind}), {machine['cores']} cores"

    @property
    def details(self) -> str:
        """Return model, machine, date and commit in one line."""
        where = self.report.get("environment", {})
        commit = f", commit {where['commit']}" if where.get("commit") else ""
        return f"{self.model} on {self.machine}, {str(where.get('date', 'undated'))[:10]}{commit}"


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read result files. Raises UserError: one is missing, damaged, or of a kind without a report."""
    return [_read(path) for path in paths]


def _read(path: Path) -> Result:
    report = read_json(path)
    what = report.get("what") if isinstance(report, dict) else None
    if what not in KINDS:
        raise UserError(f"{path}: what: {str(what)[:60]}: must be one of {', '.join(KINDS)}")
    if missing := [name for name in _NEEDED.get(what, _NEEDED_OF_BENCH) if name not in report]:
        raise UserError(f"{path}: {missing[0]}: missing: it is no result of `longreach {what}`, or a damaged one")
    return Result(path, report)


def rows_of(results: Iterable[Result], *kinds: str) -> Iterator[tuple[Result, dict[str, Any]]]:
    """Yield the rows of the results of some kinds, each with its file."""
    for result in results:
        if result.what in kinds:
            yield from ((result, row) for row in result.rows)


def machine_marks(results: Iterable[Result]) -> dict[str, str]:
    """Return what is put behind the name of a series for each machine: nothing while there is one."""
    machines = list(dict.fromkeys(result.machine for result in results))
    return dict.fromkeys(machines, "") if len(machines) < 2 else {name: f", {name}" for name in machines}


def common_details(results: Iterable[Result]) -> str:
    """Return where results were measured, in one line; of several machines, their models and dates."""
    lines = list(dict.fromkeys(result.details for result in results))
    return lines[0] if len(lines) == 1 else "; ".join(lines[:3]) + ("; ..." if len(lines) > 3 else "")
