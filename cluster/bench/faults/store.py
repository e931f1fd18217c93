"""Faults of stored KV: blocks that are torn, changed, foreign, of another layout; a full disk."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.faults.files import SmallDiskHead, checkpoint, full_data_disk
from cluster.bench.faults.rig import FaultHead, Requests, Rig, Verdict, free_port, random_prompt
from cluster.bench.head_process import until
from cluster.bench.history import History
from cluster.bench.recorder import Recorder

BLOCK = 512  # tokens, kv_store.block_tokens
_LENGTH = 3000  # of a prompt: 5 whole blocks
_WHOLE = _LENGTH // BLOCK
_STORE_DISK_MIB = 7  # 3 blocks of the demo model in float32
_COUNT = re.compile(r'^longreach_kv_store_blocks_total\{event="(\w+)"\} (\S+)', re.MULTILINE)

Spoil = Callable[[Path, random.Random], object]  # changes the folder of one stored block


def store_settings(folder: Path) -> dict[str, Any]:
    """Return sections of a head that stores KV in a folder, and tells in metrics what it did with it."""
    return {"kv_store": {"path": str(folder), "max_bytes": 4 << 30}, "server": {"metrics_port": free_port()}}


def _metrics(head: FaultHead) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{head.settings['server']['metrics_port']}/metrics") as page:
        return str(page.read().decode())


def counts(head: FaultHead) -> dict[str, float]:
    """Return what the head counted of stored blocks, by event."""
    return {event: float(value) for event, value in _COUNT.findall(_metrics(head))}


def blocks(store: Path) -> list[Path]:
    """Return the folders of stored blocks in the order of the prompt."""
    folders = [folder for folder in store.glob("v1/??/*") if any(folder.glob("*.safetensors"))]
    return sorted(folders, key=_start)


def _start(block: Path) -> int:
    return int(_metadata(block)["start"])


def _metadata(block: Path) -> dict[str, str]:
    with next(iter(block.glob("*.safetensors"))).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header["__metadata__"])


class StoredPrompts:
    """Which blocks a folder has at one moment, and how much of a prompt they cover."""

    def __init__(self, store: Path, num_files: int, names: frozenset[str] = frozenset()) -> None:
        """Args: `num_files`: of a whole block; `names`: of its whole blocks."""
        self._store = store
        self._num_files = num_files
        self._names = names

    def now(self) -> StoredPrompts:
        """Look at the folder."""
        whole = (f for f in self._store.glob("v1/??/*") if len(list(f.glob("*.safetensors"))) >= self._num_files)
        return StoredPrompts(self._store, self._num_files, frozenset(folder.name for folder in whole))

    def prompts(self) -> dict[tuple[int, tuple[int, ...]], str]:
        """Return the name of every block by its start and tokens."""
        found = {}
        for folder in blocks(self._store):
            metadata = _metadata(folder)
            found[int(metadata["start"]), _token_ids(metadata)] = folder.name
        return found

    def prefix(self, ids: Sequence[int], names: Mapping[tuple[int, tuple[int, ...]], str]) -> int:
        """Return how many tokens of a prompt were stored from its beginning, by the names of `prompts`."""
        start = 0
        while names.get((start, tuple(ids[start : start + BLOCK]))) in self._names:
            start += BLOCK
        return start


def _token_ids(metadata: Mapping[str, str]) -> tuple[int, ...]:
    return tuple(map(int, metadata["token_ids"].split(",")))


def _ask(head: FaultHead, history: History, kind: str, requests: Requests, stored: int = 0) -> int:
    """Run a job and follow it; return its cached tokens. Waits until `stored` blocks are written since the start."""
    with Recorder(head.address, history, f"asks {kind}") as client:
        job = client.submit(kind, requests[kind], f"{kind} {time.monotonic()}")
        client.follow(job)
        ended = client.wait(job)
        until(lambda: counts(head).get("stored", 0) >= stored, f"{stored} stored blocks", 60)
        return int(ended.answers[0].cached_tokens)


def _spoiled(rig: Rig, seed: int, ways: Mapping[str, Spoil]) -> Verdict:
    """Store a prompt a way and spoil a block of each while no head runs; the next one must not use it."""
    draw, verdict, history = random.Random(seed), Verdict(), History()
    store = rig.new_folder() / "kv"
    with rig.fresh(2, 1, **store_settings(store)) as head:
        head.start()
        requests: dict[str, Any] = {}
        spoiled: dict[str, tuple[Path, int]] = {}
        known: set[Path] = set()
        for number, kind in enumerate(ways):
            requests[kind] = random_prompt(seed * 10 + number, _LENGTH)
            _ask(head, history, kind, requests, stored=_WHOLE * (number + 1))
            mine = [block for block in blocks(store) if block not in known]
            known |= set(mine)
            at = draw.randrange(len(mine))
            spoiled[kind] = mine[at], at
        verdict.expect(head.stop() == 0, "the head did not stop in order")
        for kind, (block, _) in spoiled.items():
            ways[kind](block, draw)
        head.start()
        for kind, (_, at) in spoiled.items():
            cached = _ask(head, history, kind, requests)
            verdict.facts[kind] = {"block": at, "cached_tokens": cached}
            verdict.expect(cached <= at * BLOCK, f"{kind}: block {at} was spoiled, {cached} tokens were taken over")
            verdict.expect(cached == at * BLOCK, f"{kind}: {cached} tokens of {at} good blocks were taken over")
        verdict.facts["counts"] = counts(head)
        verdict.expect(counts(head).get("damaged", 0) >= len(ways), "not every spoiled block was counted")
    return rig.judge(verdict, history, requests)


def _a_file(block: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(block.glob("*.safetensors")))


def _cut(block: Path, draw: random.Random) -> None:
    path = _a_file(block, draw)
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw))])


def _empty(block: Path, draw: random.Random) -> None:
    _a_file(block, draw).write_bytes(b"")


def _zeros(block: Path, draw: random.Random) -> None:
    """Leave the end as zeros, as a file system does that lost power."""
    path = _a_file(block, draw)
    raw = path.read_bytes()
    at = draw.randrange(len(raw) // 2, len(raw) - 4096)
    path.write_bytes(raw[:at] + bytes(len(raw) - at))


def _flip_data(block: Path, draw: random.Random) -> None:
    """Change one bit behind the header."""
    path = _a_file(block, draw)
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(8 + int.from_bytes(raw[:8], "little"), len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def _flip_token(block: Path, draw: random.Random) -> None:
    """Change one digit in the metadata."""
    path = _a_file(block, draw)
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    begin = raw.index(b"__metadata__")
    digits = [at for at in range(begin, end) if raw[at : at + 1].isdigit()]
    at = draw.choice(digits)
    raw[at] = ord("7") if raw[at] != ord("7") else ord("3")
    path.write_bytes(raw)


def torn_block(rig: Rig, seed: int) -> Verdict:
    """Stored blocks that are cut off, empty, or zeros at the end."""
    return _spoiled(rig, seed, {"cut": _cut, "empty": _empty, "zeros": _zeros})


def flipped_block(rig: Rig, seed: int) -> Verdict:
    """Stored blocks of which one bit of the data or one digit of the metadata is another."""
    return _spoiled(rig, seed, {"data": _flip_data, "metadata": _flip_token})


def _exchange(block: Path, draw: random.Random) -> None:
    """Put the content of a neighbouring block under this block's name."""
    others = [other for other in block.parent.parent.glob("*/*") if other != block]
    other = draw.choice(sorted(others))
    for path in block.iterdir():
        path.unlink()
    for path in other.glob("*.safetensors"):
        (block / path.name).write_bytes(path.read_bytes())


def block_of_another_model(rig: Rig, seed: int) -> Verdict:
    """KV of a model whose weights differ, in the same store, is never used; nor a block under another's name."""
    verdict, history = Verdict(), History()
    store, requests = rig.new_folder() / "kv", {"prompt": random_prompt(seed, _LENGTH)}
    model = checkpoint(rig)
    path = model / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\x11\x3c"
    for at in range(len(raw) // 2, len(raw) // 2 + 20_000, 2):  # bfloat16
        raw[at] ^= 0x40
    path.write_bytes(raw)
    with rig.fresh(2, 1, model={"path": str(model)}, **store_settings(store)) as head:
        head.start()
        _ask(head, History(), "prompt", requests, stored=_WHOLE)
    with rig.fresh(2, 1, **store_settings(store)) as head:
        head.start()
        cached = _ask(head, history, "prompt", requests, stored=_WHOLE)
        verdict.expect(not cached, f"{cached} tokens of another model's KV were taken over")
    rig.judge(verdict, history, requests)
    renamed = _spoiled(rig, seed + 1, {"under another name": _exchange})
    return Verdict(verdict.facts | renamed.facts, verdict.problems + renamed.problems)


def block_of_another_layout(rig: Rig, seed: int) -> Verdict:
    """KV that 2 x 2 shards stored is used by 1 x 1 and 1 x 2, and what they add by the first ones."""
    verdict, history = Verdict(), History()
    store, requests = rig.new_folder() / "kv", {"prompt": random_prompt(seed, _LENGTH)}
    layouts = ((2, 2), (1, 1), (1, 2), (2, 1)) if rig.full else ((2, 2), (1, 1))
    for number, layout in enumerate(layouts):
        with rig.fresh(*layout, **store_settings(store)) as head:
            head.start()
            cached = _ask(head, history, "prompt", requests, stored=0 if number else _WHOLE)
            verdict.facts[f"{layout[0]} x {layout[1]}"] = cached
            verdict.expect(cached == (BLOCK * _WHOLE if number else 0), f"{layout}: {cached} tokens were taken over")
            verdict.expect(not counts(head).get("damaged"), f"{layout}: {counts(head)}")
    return rig.judge(verdict, history, requests)


def disk_full(rig: Rig, seed: int) -> Verdict:
    """The disk of the data directory is full for a while; that of stored KV is: jobs go on, nothing more is stored."""
    data = full_data_disk(rig, seed)
    verdict, history = Verdict(), History()
    requests = {f"prompt {n}": random_prompt(seed * 7 + n, _LENGTH) for n in range(3)}
    folder = rig.new_folder()
    head = SmallDiskHead(folder, "kv", _STORE_DISK_MIB, **store_settings(folder / "kv"))
    try:
        head.start()
        for kind in requests:
            _ask(head, history, kind, requests)
        until(lambda: "longreach_kv_store_is_full 1.0" in _metrics(head), "a metric that says the disk is full", 30)
        verdict.facts["counts"] = counts(head)
        warnings = [line for line in head.log.read_text(errors="replace").splitlines() if "WARNING" in line]
        full = [line for line in warnings if "space" in line or "full" in line]
        verdict.expect(len(full) == 1, f"{len(full)} warnings of a full disk: {full[:3]}")
        left = [path.name for path in head.inside(folder / "kv").rglob("*") if "tmp" in path.name]
        verdict.expect(not left, f"files that were not finished are left: {left[:3]}")
    finally:
        head.close()
    rig.judge(verdict, history, requests)
    return Verdict({"data": data.facts, "store": verdict.facts}, data.problems + verdict.problems)
