"""Heads over the demo model that store KV, their answers with the times a client sees, and the files they store."""

from __future__ import annotations

import functools
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster.bench.faults.rig import PATIENT, free_port, merged
from cluster.bench.head_process import HeadProcess, until
from cluster.client.client import Client, Job
from cluster.client.models import Answer, JobEnded, ProgressEvent, TokenEvent
from cluster.config.configs_dir import configs_dir
from cluster.config.memory_budget import DTYPE_BYTES
from cluster.config.yaml_source import ConfigSource
from cluster.tools.assets import needle_dir
from protos.model.config_json import load_model_spec

Layout = tuple[int, int]  # stages, shards a stage
Counts = dict[str, float]  # of the head's metrics, such as `stored blocks`
Say = Callable[[str], None]

ROOM = 1024  # tokens of a question and its answer, at most
_CONTEXTS = 2  # whole prompts that the KV cache holds
_QUIET_S = 2.0  # nothing more is stored after as long a pause
_SETTLED_WITHIN_S = 600.0
_PIECE = 1 << 20
_COUNT = re.compile(r'^longreach_kv_store_(\w+)_total\{event="(\w+)"\} (\S+)', re.MULTILINE)


class DemoHead(HeadProcess):
    """A head in processes of its own over the demo model and settings (configs/demo.yaml), in a folder of its own."""

    def __init__(
        self, folder: Path, layout: Layout, length: int, dtype: str = "auto", *, data: Path | None = None,
        is_storing: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            length: most tokens of a document or prompt.
            data: data directory, of an earlier head; by default one in the folder.
        """
        folder.mkdir(parents=True)
        self.port, self.metrics_port = free_port(), free_port()
        data = data or folder / "data"
        demo = ConfigSource(configs_dir() / "demo.yaml", {}).data
        settings = merged(demo, {
            "model": {"path": str(needle_dir()), "dtype": dtype, "max_model_len": length + ROOM},
            "cluster": {"pipeline_parallel_size": layout[0], "expert_parallel_size": layout[1]},
            "kv_cache": {"bytes": kv_cache_bytes(layout, _CONTEXTS * (length + ROOM), dtype)},
            "kv_store": {"enabled": is_storing},
            "server": {"port": self.port, "metrics_port": self.metrics_port},
            "data_dir": str(data),
        })  # fmt: skip
        config = folder / "head.yaml"
        config.write_text(json.dumps(settings))  # JSON is YAML too
        super().__init__(config, data, folder / "head.log")

    def __enter__(self) -> DemoHead:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.close()

    @property
    def store(self) -> Path:
        """The folder of stored KV."""
        return self.data / "kv"

    def client(self) -> Client:
        """Return a patient client."""
        return Client(f"127.0.0.1:{self.port}", retries=PATIENT)

    def counts(self) -> Counts:
        """Return what the head counted of stored KV since its start, such as `stored blocks` and `loaded bytes`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as page:
            text = page.read().decode()
        return {f"{event} {what}": float(value) for what, event, value in _COUNT.findall(text)}

    def settle(self) -> Counts:
        """Return the counts once everything computed is stored or given up, and is on the disk."""
        seen, since = self.counts(), time.monotonic()

        def is_quiet() -> bool:
            nonlocal seen, since
            time.sleep(0.1)
            if (now := self.counts()) != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > _QUIET_S

        until(is_quiet, "an end of storing", _SETTLED_WITHIN_S)
        os.sync()
        return seen


@functools.cache
def block_tokens() -> int:
    """Return the tokens of a stored block of such a head."""
    return int(ConfigSource(configs_dir() / "demo.yaml", {}).data["kv_store"]["block_tokens"])


def kv_cache_bytes(layout: Layout, tokens: int, dtype: str) -> int:
    """Return the bytes of each shard's KV cache for so many tokens of the demo model, and at least those of the demo.

    Args:
        dtype: of the YAML; "auto" is that of the checkpoint, bfloat16.
    """
    spec = load_model_spec(needle_dir())
    layers, heads = -(-spec.num_hidden_layers // layout[0]), -(-spec.num_key_value_heads // layout[1])
    width = DTYPE_BYTES["bfloat16" if dtype == "auto" else dtype]
    return max(256 << 20, tokens * layers * heads * 2 * spec.head_dim * width)


class Asked(NamedTuple):
    """What a client saw of a job with one answer, in seconds since it was submitted."""

    first_token_s: float  # infinite: none came
    total_s: float
    progress: list[tuple[float, int]]  # seconds, tokens of the prompt that were done
    tokens: list[float]  # when each came
    answer: Answer

    @property
    def computed(self) -> int:
        """Tokens of the prompt that were not found."""
        return self.answer.prompt_tokens - self.answer.cached_tokens

    def reached(self, tokens: float) -> float:
        """Return when so many tokens of the prompt were done."""
        return next((at for at, done in self.progress if done >= tokens), self.first_token_s)


def follow(submit: Callable[[], Job]) -> Asked:
    """Submit a job and follow it to its end. Raises RuntimeError when it does not succeed."""
    began = time.perf_counter()
    job = submit()
    progress: list[tuple[float, int]] = []
    tokens: list[float] = []
    for event in job.stream():
        at = time.perf_counter() - began
        if isinstance(event, ProgressEvent):
            progress.append((at, event.progress.processed))
        elif isinstance(event, TokenEvent):
            tokens.append(at)
        elif isinstance(event, JobEnded) and event.job.state != "succeeded":
            raise RuntimeError(f"the job is {event.job.state}: {event.job.error}")
    return Asked(tokens[0], time.perf_counter() - began, progress, tokens, job.data.answers[0])


# --- files -----------------------------------------------------------------------------------------------------------


def stored_files(store: Path) -> Iterator[Path]:
    """Yield the files of a folder of stored KV, but for its name."""
    for folder, _, names in os.walk(store):
        yield from (Path(folder) / name for name in names if name != "id")


def stored_bytes(store: Path) -> int:
    """Return the bytes of all files of stored KV, of those not finished too."""
    total = 0
    for path in stored_files(store):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def leave_page_cache(store: Path) -> None:
    """Have the files written to the disk and leave the page cache of this system, so that they are read from the disk.

    What a hypervisor or a disk has in caches of its own is beyond reach.
    """
    for path in stored_files(store):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_plainly(store: Path) -> int:
    """Read the files one after the other, which leaves them in the page cache; return their bytes."""
    buffer, size = bytearray(_PIECE), 0
    for path in stored_files(store):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def disk_rate(store: Path) -> float:
    """Return the bytes a second at which plain reads of the files, one after the other, come from the disk."""
    leave_page_cache(store)
    began = time.perf_counter()
    return read_plainly(store) / (time.perf_counter() - began)


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass
class Bounds:
    """What was promised beside what was measured."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def at_most(self, what: str, value: float, bound: float, digits: int = 4) -> None:
        """Note a figure and the most that it may be."""
        self.rows.append({"what": what, "value": round(value, digits), "at_most": bound, "met": value <= bound})

    def equal(self, what: str, value: object, expected: object) -> None:
        """Note a figure that must be another one."""
        self.rows.append({"what": what, "value": value, "expected": expected, "met": value == expected})

    def to_json(self) -> dict[str, Any]:
        """Return every bound, and whether all are met."""
        return {"bounds": self.rows, "met": all(row["met"] for row in self.rows)}


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> Counts:
    """Return how much counts have grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def rounded(values: Sequence[float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]
