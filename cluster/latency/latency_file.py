"""What was learned of the time of steps, kept by hardware and model: `latency/KEY.json` in the data directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.common.text_format import one_line
from cluster.latency.model import LatencyModel

FOLDER = "latency"
_SCHEMA = 2
_SAVE_EVERY_S = 60.0
_MAX_BYTES = 1 << 20
_MAX_FILES = 1000  # that a search reads
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """What measured steps belong to; all of it is the key.

    `hardware` names processor, or processor and kind of GPU; `threads` are those of one shard, of `cores`; `model` is
    the digest of its spec without sparse prefill, and `sparse` that of its sparse prefill ("" without); types are those
    of computation and KV.
    """

    hardware: str
    cores: int
    threads: int
    stages: int
    shards: int
    model: str
    sparse: str
    dtype: str
    kv_dtype: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


class LatencyFile:
    """The file of one `Measured` in a data directory. Trouble with it is logged and costs the memory, nothing else."""

    def __init__(self, data_dir: Path, of: Measured, clock: Callable[[], float] = time.monotonic) -> None:
        self._of = of
        self.path = data_dir / FOLDER / f"{of.key}.json"
        self._clock = clock
        self._saved_at = clock()
        self._saved_steps = 0

    def load(self, model: LatencyModel) -> bool:
        """Give a model what earlier runs have learned; returns whether there was any."""
        try:
            model.restore(_read(self.path)["learned"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s: cannot be used, times are learned anew (%s)", self.path, one_line(error, 200))
            return False
        self._saved_steps = model.num_steps
        return True

    def save(self, model: LatencyModel) -> None:
        """Replace the file if there are new steps."""
        if model.num_steps == self._saved_steps:
            return
        steps = model.num_steps
        content = {"schema": _SCHEMA, "of": asdict(self._of), "steps": steps, "learned": model.to_json()}
        fresh = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump(content, file)
            fresh.replace(self.path)
        except OSError as error:
            _log.warning("%s: cannot be written (%s)", self.path, error.strerror)
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
        self._saved_steps, self._saved_at = steps, self._clock()

    def save_sometimes(self, model: LatencyModel) -> None:
        """As `save`, once a minute at most."""
        if self._clock() - self._saved_at >= _SAVE_EVERY_S:
            self.save(model)


def measured_files(data_dir: Path) -> Iterator[tuple[Measured, dict[str, Any]]]:
    """Yield what is kept in a data directory, with what was learned; files that cannot be read are left out."""
    with contextlib.suppress(OSError):
        for path in sorted((data_dir / FOLDER).glob("*.json"))[:_MAX_FILES]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = _read(path)
                yield Measured(**content["of"]), content["learned"]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file of this version. Raises OSError, ValueError."""
    with path.open("rb") as file:
        content = json.loads(file.read(_MAX_BYTES))
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise ValueError("it is of another version")
    return content
