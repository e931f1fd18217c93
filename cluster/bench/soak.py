"""A head under random work and faults for many minutes: what it and its processes use must not grow."""

from __future__ import annotations

import random
import secrets
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.bench.faults.rig import FaultHead, Rig, Verdict
from cluster.bench.faults.store import store_settings
from cluster.bench.history import History
from cluster.bench.kills import TARGETS, Load, kill_one
from cluster.bench.recorder import Recorder, Refused
from cluster.bench.resumable import Results
from protos.jobs import jobs_pb2 as pb

EVERY_S = 10.0  # between samples
PIECE_S = 120.0  # of a soak: then jobs are drained, judged and written down
_WARM_UP = 0.25  # share of the samples that are not judged: caches and pools fill
_KILL_S = (20.0, 60.0)  # between faults
_STORE_BYTES = 256 << 20  # reached within minutes, so that eviction runs
# most that a quantity may grow in an hour: by its fitted slope, and by what the scatter of its samples hides
BOUNDS = {
    "head_rss": 64 << 20, "stage_rss": 128 << 20, "head_descriptors": 20, "stage_descriptors": 10, "threads": 20,
    "data_bytes": 128 << 20, "tmp_bytes": 32 << 20, "tmp_files": 200, "shm_bytes": 32 << 20, "sockets": 40,
    "processes": 5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """What a head uses at one moment; `head` counts its starts, since a new process begins with less."""

    at_s: float
    head: int
    head_rss: int
    stage_rss: int  # of all stages together
    head_descriptors: int
    stage_descriptors: int
    threads: int  # of the head
    data_bytes: int  # of the data directory without the KV store, which has a quota
    store_bytes: int
    tmp_bytes: int
    tmp_files: int
    shm_bytes: int
    sockets: int  # of all processes
    processes: int


def sample(head: FaultHead, began: float, store: Path, tmp: Path, starts: int) -> Sample | None:
    """Look at a head and its files; None while a part of it is away."""
    stages, shards = head.layout
    try:
        main = psutil.Process(head.pid)
        workers = head.find("stage")
        if len(workers) != stages * shards:
            return None
        everything = head.processes()
        data, _ = _usage(head.data)
        kept, _ = _usage(store)
        tmp_bytes, tmp_files = _usage(tmp)
        return Sample(
            round(time.monotonic() - began, 1), starts, main.memory_info().rss,
            sum(process.memory_info().rss for process in workers), main.num_fds(),
            sum(process.num_fds() for process in workers), main.num_threads(), data, kept, tmp_bytes, tmp_files,
            _usage(Path("/dev/shm"))[0], sum(len(process.net_connections("all")) for process in everything),
            len(everything),
        )  # fmt: skip
    except psutil.Error:
        return None


def _usage(folder: Path) -> tuple[int, int]:
    """Return (bytes, files) below a folder; files that vanish meanwhile do not count."""
    size = files = 0
    for path in _walk(folder):
        try:
            size += path.lstat().st_size
            files += 1
        except OSError:
            continue
    return size, files


def _walk(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in folder.rglob("*") if not path.is_dir())
    except OSError:
        return


def growth(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of (seconds, value) in an hour and half the width of its interval, by Theil and Sen.

    The slope is the median of those of all pairs; the interval holds the middle half of them, so single jumps, as a
    restart makes, hardly count.
    """
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0]) for n, a in enumerate(points) for b in points[n + 1 :] if b[0] - a[0] > EVERY_S
    ]
    if len(slopes) < 4:
        return 0.0, 0.0
    quarters = statistics.quantiles(slopes, n=4)
    return statistics.median(slopes) * 3600, (quarters[2] - quarters[0]) / 2 * 3600


def judge_growth(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return for every quantity its slope in an hour, the bound, its first and last level, and whether it is flat.

    Flat is: the slope is within the bound, or the level at the end (median of the last quarter) is at most a tenth of
    the bound above that at the beginning (median of the first quarter after the warm-up).
    """
    rest = samples[int(len(samples) * _WARM_UP) :]
    report: dict[str, dict[str, Any]] = {}
    for name, bound in BOUNDS.items():
        points = [(entry["at_s"], entry[name]) for entry in rest]
        slope, width = growth(points)
        quarter = max(1, len(points) // 4)
        first, last = (
            statistics.median([value for _, value in part] or [0]) for part in (points[:quarter], points[-quarter:])
        )
        flat = slope <= bound or last - first <= bound / 10
        report[name] = {
            "per_hour": round(slope), "half_width": round(width), "bound": bound, "first": first, "last": last,
            "flat": flat,
        }  # fmt: skip
    return report


class _Documents(threading.Thread):
    """Adds, appends to, lists and deletes documents until it is stopped."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__(name="documents")
        self._address, self._draw = address, random.Random(f"documents {seed}")
        self.stopping = threading.Event()
        self.done: Counter[str] = Counter()
        self.errors: set[str] = set()

    def run(self) -> None:
        kept: list[str] = []
        with Recorder(self._address, History(), "documents", patience_s=0) as client:
            while not self.stopping.wait(self._draw.uniform(0.2, 1.5)):
                try:
                    self._step(client, kept)
                except Refused as error:  # the head may be away
                    self.errors.add(": ".join(str(error).split(": ")[:2]))

    def _step(self, client: Recorder, kept: list[str]) -> None:
        text = f"{self._draw.random()} " + "The code of old stone is 12345. " * self._draw.randint(5, 300)
        header = pb.DocumentHeader(name="soak")
        method = "UploadDocument"
        if kept and self._draw.random() < 0.4:
            method, header.append_to = "AppendDocument", self._draw.choice(kept)
        pieces = [pb.DocumentPiece(header=header), pb.DocumentPiece(data=text.encode())]
        kept.append(client.call(method, pieces).id)
        self.done[method] += 1
        if len(kept) > 5:
            client.call("DeleteDocument", pb.DocumentRequest(id=kept.pop(self._draw.randrange(len(kept)))))
            self.done["DeleteDocument"] += 1
        client.call("ListDocuments", pb.ListDocumentsRequest())


def measure_soak(
    minutes: float, seed: int, kills: bool, resume: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Run random jobs, faults and documents for so many minutes; return samples, their growth and what was broken.

    The time is cut into pieces over one head and one data directory. With `resume`, pieces that the file has are not
    run again; the head then is another one, and growth is judged over the pieces of the one that ran longest.
    """
    run = {"what": "soak", "seed": seed, "minutes": minutes, "kills": kills}
    results = Results(resume, run)
    pieces = max(1, round(minutes * 60 / PIECE_S))
    with tempfile.TemporaryDirectory(prefix="lr-soak-") as root:
        rig = Rig(Path(root))
        store = rig.new_folder() / "kv"
        sections = store_settings(store)
        sections["kv_store"]["max_bytes"] = _STORE_BYTES
        sections["server"] |= {"result_ttl_s": 120, "document_ttl_s": 120}
        began, session = time.monotonic(), secrets.token_hex(4)
        tmp = Path(root, "t")
        tmp.mkdir()
        try:
            with rig.fresh(2, 1, **sections) as head:
                head.environment["TMPDIR"] = str(tmp)
                if len(results.rows) < pieces:
                    head.start()
                for number in range(len(results.rows), pieces):
                    row = _piece(rig, head, number, seed, kills, began, store, tmp, min(PIECE_S, minutes * 60))
                    results.add({"session": session} | row)
                    say(f"piece {number + 1} of {pieces}: {row['facts'].get('jobs', 0)} jobs, {row['problems'][:1]}")
        finally:
            rig.close()
    return run | summarize_soak(results.rows)


def _piece(
    rig: Rig, head: FaultHead, number: int, seed: int, kills: bool, began: float, store: Path, tmp: Path, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Work on a head for a while and judge it; samples are taken all the time."""
    draw, history = random.Random(f"soak {seed} {number}"), History()
    load = Load(head.address, history, seed * 1000 + number, at_once=4)
    documents = _Documents(head.address, seed * 1000 + number)
    samples: list[dict[str, Any]] = []
    faults: list[str] = []
    starts = 0
    end = time.monotonic() + seconds
    next_sample, next_fault = time.monotonic(), time.monotonic() + draw.uniform(*_KILL_S)
    documents.start()
    load.start()
    try:
        while time.monotonic() < end:
            now = time.monotonic()
            if now >= next_sample:
                next_sample = now + EVERY_S
                if (taken := sample(head, began, store, tmp, starts)) is not None:
                    samples.append(asdict(taken))
            if kills and now >= next_fault:
                next_fault = now + draw.uniform(*_KILL_S)
                target = draw.choice(TARGETS)
                kill_one(head, target, draw)
                starts += target == "head"
                faults.append(target)
            time.sleep(0.2)
    finally:
        documents.stopping.set()
        documents.join()
        load.finish()
    verdict = rig.judge(Verdict(), history, load.requests)
    largest = max((entry["store_bytes"] for entry in samples), default=0)
    verdict.expect(largest <= 1.1 * _STORE_BYTES, f"{largest} bytes are stored, the quota is {_STORE_BYTES}")
    facts = verdict.facts | {
        "faults": faults,
        "largest_store_bytes": largest,
        "documents": dict(documents.done),
        "away": sorted(documents.errors),
    }
    return {"piece": number, "samples": samples, "problems": verdict.problems + load.broken, "facts": facts}


def summarize_soak(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report over all pieces."""
    sessions: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        sessions[row["session"]] += row["samples"]
    samples = max(sessions.values(), key=len, default=[])
    report = judge_growth(samples)
    return {
        "jobs": sum(row["facts"].get("jobs", 0) for row in rows),
        "tokens": sum(row["facts"].get("tokens", 0) for row in rows),
        "sessions": len(sessions),
        "faults": [fault for row in rows for fault in row["facts"].get("faults", [])],
        "problems": [problem for row in rows for problem in row["problems"]],
        "growing": [name for name, found in report.items() if not found["flat"]],
        "growth": report,
        "samples": samples,
    }


def draw_soak(report: dict[str, Any], path: Path) -> None:
    """Write the samples of a report as a picture, a panel a quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    minutes = [entry["at_s"] / 60 for entry in report["samples"]]
    panels = list(figure.subplots(3, 4).flat)
    for axes in panels:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels, report["growth"].items(), strict=False):
        axes.set_visible(True)
        axes.plot(minutes, [entry[name] for entry in report["samples"]], ".-", markersize=3)
        axes.set_title(f"{name}{'' if found['flat'] else ' (grows)'}", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.supxlabel("minutes")
    figure.savefig(path, dpi=120, format="png")
