"""Faults of files: checkpoints, configurations and disks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from cluster.bench.faults.rig import FaultHead, Rig, Running, Verdict, mixed_jobs, random_prompt
from cluster.bench.faults.yaml_files import generate
from cluster.bench.head_process import marked_processes, marking, until
from cluster.bench.history import History
from cluster.bench.recorder import Recorder, Refused
from cluster.config.deployment import load_deployment
from cluster.config.yaml_source import ConfigError
from cluster.tools.assets import needle_dir

_START_S = 120.0
_DISK_MIB = 24
# a disk of its own for the data directory, in a mount namespace that only the head is in
_SMALL_DISK = 'mount -t tmpfs -o size=$1m none "$2" && shift 2 && exec "$@"'


def checkpoint(rig: Rig) -> Path:
    """Return a copy of the demo checkpoint."""
    folder = rig.new_folder() / "model"
    shutil.copytree(needle_dir(), folder, ignore=shutil.ignore_patterns("book*", "README*"))
    return folder


def _edit_header(path: Path, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change the header of a safetensors file; the tensors stay where they are."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def _refused_start(rig: Rig, verdict: Verdict, what: str, model: Path) -> None:
    """Start a head over a checkpoint; it must end soon with one line that names a file or tensor, and leave nothing."""
    with rig.fresh(1, 1, model={"path": str(model)}) as head:
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "cluster.cli", "serve", str(head.config)]
        done = subprocess.run(
            command, env=os.environ | marking(mark), capture_output=True, text=True, timeout=_START_S, check=False
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("longreach: error: ")]
        verdict.facts[what] = [done.returncode, lines[-1][:300].replace(str(model), "MODEL") if lines else ""]
        verdict.expect(0 < done.returncode < 128, f"{what}: exit code {done.returncode}")
        verdict.expect(len(lines) == 1, f"{what}: {len(lines)} lines of error: {done.stderr[-300:]!r}")
        verdict.expect("Traceback" not in done.stderr, f"{what}: a traceback")
        named = str(model) in done.stderr or "model." in done.stderr
        verdict.expect(named, f"{what}: neither file nor tensor is named: {lines}")
        left = marked_processes(mark)
        verdict.expect(not left, f"{what}: processes are left: {left}")


def corrupt_safetensors(rig: Rig, seed: int) -> Verdict:
    """Weights whose header is noise, too long, no JSON, or whose end is missing."""
    draw, verdict = random.Random(seed), Verdict()
    ways: dict[str, Callable[[bytes], bytes]] = {
        "cut off": lambda raw: raw[: draw.randrange(len(raw) // 2, len(raw) - 1)],
        "a header of noise": lambda raw: raw[:8] + draw.randbytes(2000) + raw[2008:],
        "a header beyond the file": lambda raw: (1 << 40).to_bytes(8, "little") + raw[8:],
        "nothing": lambda raw: b"",
        "noise": lambda raw: draw.randbytes(5000),
    }
    for what in ways if rig.full else draw.sample(sorted(ways), 2):
        model = checkpoint(rig)
        path = model / "model.safetensors"
        path.write_bytes(ways[what](path.read_bytes()))
        _refused_start(rig, verdict, what, model)
    return verdict


def missing_safetensors(rig: Rig, seed: int) -> Verdict:
    """No file of weights; a file that lacks a tensor."""
    draw, verdict = random.Random(seed), Verdict()
    model = checkpoint(rig)
    (model / "model.safetensors").unlink()
    _refused_start(rig, verdict, "no file", model)
    model = checkpoint(rig)

    def rename(header: dict[str, dict[str, object]]) -> None:
        header["model.another"] = header.pop(_a_tensor(header, draw))

    _edit_header(model / "model.safetensors", rename)
    _refused_start(rig, verdict, "no such tensor", model)
    return verdict


def wrong_shape_safetensors(rig: Rig, seed: int) -> Verdict:
    """Tensors of another shape, and of another type, than config.json says."""
    draw, verdict = random.Random(seed), Verdict()

    def transpose(header: dict[str, dict[str, object]]) -> None:
        shape = [entry for entry in header.values() if len(set(entry.get("shape", []))) == 2]  # type: ignore[call-overload]
        chosen = draw.choice(shape)
        chosen["shape"] = list(reversed(chosen["shape"]))  # type: ignore[call-overload]

    def retype(header: dict[str, dict[str, object]]) -> None:
        header[_a_tensor(header, draw)]["dtype"] = "I16"  # as many bytes

    for what, edit in {"transposed": transpose, "another type": retype}.items():
        model = checkpoint(rig)
        _edit_header(model / "model.safetensors", edit)
        _refused_start(rig, verdict, what, model)
    return verdict


def _a_tensor(header: dict[str, dict[str, object]], draw: random.Random) -> str:
    return draw.choice(sorted(name for name in header if name.startswith("model.")))


def malformed_yaml(rig: Rig, seed: int) -> Verdict:
    """10,000 configuration files that nobody would write: each loads, or fails in one line that names the file."""
    verdict, path = Verdict(), rig.new_folder() / "head.yaml"
    (path.parent / "needle").symlink_to(needle_dir())
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(10_000 if rig.full else 1_000):
        content = generate(seed, number)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            load_deployment(path)
            outcomes["loaded"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            text = str(error)
            is_clear = len(text.splitlines()) == 1 and text.isprintable() and re.match(f"{re.escape(str(path))}:", text)
            verdict.expect(is_clear and len(text) < 700 + len(str(path)), f"file {number}: {text!r}")
        except Exception as error:  # noqa: BLE001 - any other is a find
            verdict.problems.append(f"file {number}: {type(error).__name__}: {error}")
    verdict.facts = dict(outcomes)
    return verdict


class SmallDiskHead(FaultHead):
    """A head that has a small disk of its own at one folder, which it makes."""

    def __init__(self, folder: Path, small: str, mib: int, **sections: object) -> None:
        """Args: `small`: name of the folder below `folder`."""
        super().__init__(folder, 1, 1, **sections)
        (folder / small).mkdir(mode=0o700)
        mount = ["unshare", "-rm", "sh", "-c", _SMALL_DISK, "sh", str(mib), str(folder / small)]
        self.command = [*mount, sys.executable, "-m", "cluster.cli"]

    def inside(self, path: Path) -> Path:
        """Return a path as the head sees it."""
        return Path(f"/proc/{self.pid}/root{path}")

    def _is_ready(self) -> bool:
        self.data = self.inside(Path(self.settings["data_dir"]))
        return super()._is_ready()


def full_data_disk(rig: Rig, seed: int) -> Verdict:
    """The disk of the data directory is full for a while: clients hear why, and afterwards nothing is missing."""
    history, verdict = History(), Verdict()
    requests = mixed_jobs(seed, 3000)
    head = SmallDiskHead(rig.new_folder(), "data", _DISK_MIB, kv_store={"enabled": False})
    try:
        head.start()
        with Running(head.address, history, requests, seed) as running:
            running.until_progress("long", 500)
            filler = head.data / "filler"
            _fill(filler)
            refused = _submit_until_refused(head, seed)
            verdict.facts["while_full"] = refused
            is_clear = bool(refused) and all(code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE") for code, _ in refused)
            verdict.expect(is_clear, f"submissions to a full disk: {refused}")
            filler.unlink()
        history_after = History()
        with Recorder(head.address, history_after, "after") as client:
            until(lambda: _accepts(client, seed), "accepted jobs after the disk has room")
        return rig.judge(verdict, history, requests)
    finally:
        head.close()


def _fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9, 1):
            try:
                while file.write(b"\xff" * size) == size:
                    pass
            except OSError:
                continue


def _submit_until_refused(head: FaultHead, seed: int) -> list[tuple[str, str]]:
    """Submit long prompts until one finds no room; return how it was refused."""
    history = History()
    with Recorder(head.address, history, "while full", patience_s=0) as client:
        for number in range(50):
            try:
                client.submit("more", random_prompt(seed * 90 + number, 5000), f"more {seed} {number}")
            except Refused:
                break
    return sorted({(error.state, error.text[:120]) for error in history.of("error")})


def _accepts(client: Recorder, seed: int) -> bool:
    try:
        client.wait(client.submit("after", random_prompt(seed, 70), f"after {seed}"), 60)
    except Refused:
        return False
    return True
