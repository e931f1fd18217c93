"""The 36 faults by number and name, and what runs them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from cluster.bench.faults import files, processes, requests, store, traffic, wires
from cluster.bench.faults.rig import Rig, Verdict
from cluster.bench.resumable import Results

Run = Callable[[Rig, int], Verdict]


class Fault(NamedTuple):
    """A fault: its function, whose name and first line of text are the fault's, and whether CI runs it."""

    run: Run
    in_core: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def text(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


FAULTS: tuple[Fault, ...] = (  # numbered from 1, in the order of docs/faults.md
    Fault(processes.stage_killed_in_prefill),
    Fault(processes.shard_killed_in_prefill),
    Fault(processes.killed_at_random_chunks, True),
    Fault(processes.killed_in_decode),
    Fault(processes.killed_during_recovery, True),
    Fault(processes.head_killed, True),
    Fault(processes.worker_slow, True),
    Fault(processes.worker_hung),
    Fault(store.disk_full),
    Fault(store.torn_block),
    Fault(store.flipped_block, True),
    Fault(store.block_of_another_model),
    Fault(store.block_of_another_layout, True),
    Fault(files.corrupt_safetensors),
    Fault(files.missing_safetensors),
    Fault(files.wrong_shape_safetensors),
    Fault(files.malformed_yaml),
    Fault(requests.malformed_grpc, True),
    Fault(requests.over_long_documents, True),
    Fault(requests.empty_documents, True),
    Fault(requests.huge_documents),
    Fault(requests.documents_that_are_not_utf8, True),
    Fault(traffic.more_jobs_than_memory, True),
    Fault(traffic.slow_reader),
    Fault(traffic.disconnect_in_prefill, True),
    Fault(traffic.cancel_in_every_state, True),
    Fault(traffic.parallel_duplicates, True),
    Fault(wires.partition_between_stages),
    Fault(wires.reordering_between_stages, True),
    Fault(wires.rpc_lost_on_request),
    Fault(wires.rpc_lost_on_reply, True),
    Fault(wires.rpc_cut_in_flight),
    Fault(wires.wrong_api_keys),
    Fault(wires.plaintext_to_tls),
    Fault(requests.path_traversal, True),
    Fault(traffic.long_job_beside_short_ones),
)


def run_fault(fault: Fault, rig: Rig, seed: int) -> dict[str, Any]:
    """Return what became of one fault, also when it broke the run itself."""
    began = time.monotonic()
    try:
        verdict = fault.run(rig, seed)
    except Exception as error:  # noqa: BLE001 - the next fault is tried nevertheless
        verdict = Verdict({}, [f"{type(error).__name__}: {error}"])
    number = FAULTS.index(fault) + 1 if fault in FAULTS else 0
    row = {"number": number, "fault": fault.name, "text": fault.text, "seconds": round(time.monotonic() - began, 1)}
    return row | {"passed": not verdict.problems, "problems": verdict.problems[:20], "facts": verdict.facts}


def run_faults(
    seed: int, only: Collection[str], is_full: bool, resume: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all faults, or those of `only`, but for those that `resume` has; return the merged report."""
    results = Results(resume, {"what": "faults", "seed": seed, "full": is_full})
    done = {row["fault"] for row in results.rows}
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    with tempfile.TemporaryDirectory(prefix="lr-faults-") as folder:
        rig = Rig(Path(folder), full=is_full)
        try:
            for fault in chosen:
                if fault.name in done:
                    continue
                row = run_fault(fault, rig, seed)
                results.add(row)
                result = "passed" if row["passed"] else f"FAILED: {row['problems'][0]}"
                say(f"{row['number']:2} {fault.name}: {result} ({row['seconds']:.0f} s)")
        finally:
            rig.close()
    rows = sorted(results.rows, key=lambda row: row["number"])
    failed = [row["fault"] for row in rows if not row["passed"]]
    return {
        "what": "faults put into a head from outside", "seed": seed, "full": is_full, "faults": len(rows),
        "of": len(FAULTS), "failed": failed, "results": rows,
    }  # fmt: skip
