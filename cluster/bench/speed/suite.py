"""What each kind of benchmark measures, and its run from the settings to the result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.bench.speed.compare import measure_compare
from cluster.bench.speed.head import Layout, check_lengths, check_model
from cluster.bench.speed.prefill import measure_decode, measure_prefill
from cluster.bench.speed.run import Run
from cluster.bench.speed.scaling import measure_scaling
from cluster.bench.speed.settings import Bench, Kind
from cluster.config.deployment import fetch_model
from cluster.tools.display import Display
from cluster.tools.eval.results import ResultFile
from protos.errors import UserError

MEASURE: Mapping[Kind, Callable[[Run], None]] = {
    "prefill": measure_prefill, "decode": measure_decode, "scaling": measure_scaling,
    "compare": measure_compare,
}  # fmt: skip


def run_bench(bench: Bench, kind: Kind, out: Path, display: Display) -> tuple[dict[str, Any], ResultFile]:
    """Run a benchmark; returns its report, and the file it was written to after every row.

    Raises:
        UserError: the settings cannot be used; nothing was started. ClusterError: a head failed.
    """
    settings = bench.settings
    if settings.bench != kind:
        raise UserError(f"{bench.file}: bench: {settings.bench}: must be {kind} here, or use `bench {settings.bench}`")
    check_model(bench)
    fetch_model(settings.config, bench.overrides, display.amount)
    check_lengths(bench, longest_context(bench), [Layout(*pair) for pair in settings.layouts])
    result = ResultFile(out, f"bench-{kind}-{_model_name(bench)}")
    run = Run(bench, display, result.write)
    MEASURE[kind](run)
    run.finish()
    return run.report | {"environment": result.environment}, result


def longest_context(bench: Bench) -> int:
    """Return the tokens of the longest prompt and its answer that a benchmark asks for."""
    settings = bench.settings
    longest = max(settings.lengths)
    if settings.bench == "scaling" and "weak" in settings.scaling:
        longest = max(longest, settings.weak_length * max(Layout(*pair).processes for pair in settings.layouts))
    answer = settings.tokens + 1 if settings.bench in ("decode", "compare") else 2
    has_jobs = settings.bench == "scaling" and "throughput" in settings.scaling
    jobs = settings.job_length + settings.tokens if has_jobs else 0
    return max(longest + answer, jobs, settings.warm_up + 4)


def _model_name(bench: Bench) -> str:
    from cluster.config.deployment import load_config

    name = load_config(bench.settings.config, bench.overrides).model.served_model_name
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in name)[:60]
