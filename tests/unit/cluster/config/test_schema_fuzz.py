"""Generated YAML files: each loads, or fails in one line that begins with the file and mostly names the place.

2,000 files; `LONGREACH_FUZZ=10000` makes as many, `LONGREACH_FUZZ_SEED` others. A failing file is printed.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from cluster.config.deployment import ConfigError, Deployment, load_config, load_deployment
from tests.unit.cluster.config.test_schema import CONFIGS, write

COUNT = int(os.environ.get("LONGREACH_FUZZ", "2000"))
SEED = os.environ.get("LONGREACH_FUZZ_SEED", "20")
SOURCES = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]
SCRAPS = [
    "\n", "  ", ":", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!", "!x ", "<<: ", '"', "'", "|", ">", "%",
    "@", "\t", "#", "?", "? ", "---\n", "...", ",", ".nan", ".inf", "-1", "0", "9" * 40, "1e999", "null", "~",
    "\\", "\0", "\x85", "\u2028", "\ufeff", "é", "1:2", "=", "0x1", "0o7", "\\ud800", "\\UFFFFFFFF", "!!int ",
    "!!set ", "on", "!!python/object/apply:os.system ", "{document}", "{question}", "[" * 40, "{a: " * 20,
    "2024-01-01", "\r", "\x1b[2J",
]  # fmt: skip
KEYS = [
    "model", "cluster", "prefill", "kv_cache", "server", "security", "data_dir", "path", "dtype", "max_model_len",
    "port", "rope_scaling", "rope_type", "factor", "pipeline_parallel_size", "expert_parallel_size", "bytes",
    "fraction", "host", "page_size", "api_keys_file", "tls_cert_file", "max_num_seqs", "metrics_port",
    "document_prompt", "x", "", "on", "1",
]  # fmt: skip
VALUES = [
    "needle", "4k", "1M", "-1", "0", "1", "2", "3", "64", "0.5", ".nan", "1GiB", "true", "null", "yarn", "default",
    "cuda", "0.0.0.0", "127.0.0.1", "a.pem", "''", '"\\0"', "~x/y", "[]", "{}", "[1, [2]]", "é", "local", "auto",
    "bfloat16",
]  # fmt: skip


def mutated(noise: random.Random) -> str:
    """A published file with a few edits: text inserted, cut out, moved or doubled."""
    text = noise.choice(SOURCES)
    for _ in range(noise.randint(1, 6)):
        at, size = noise.randrange(len(text) + 1), noise.choice([0, 0, 1, 3, 30])
        cut = text[at : at + size]
        there = noise.randrange(len(text) + 1)
        inserted = noise.choice([noise.choice(SCRAPS), noise.choice(VALUES), chr(noise.randrange(0x3000)), cut * 2, ""])
        text = text[:at] + inserted + text[at + size :]
        if noise.random() < 0.2:
            text = text[:there] + cut + text[there:]
    return text


def grown(noise: random.Random, depth: int = 0) -> str:
    """A mapping of known and unknown keys with values of any kind."""
    lines = []
    for _ in range(noise.randint(1, 5)):
        key = noise.choice(KEYS)
        if depth < 3 and noise.random() < 0.45:
            inner = grown(noise, depth + 1).splitlines()
            lines += [f"{key}:", *(f"  {line}" for line in inner)]
        else:
            lines.append(f"{key}: {noise.choice(VALUES + SCRAPS)}")
    return "\n".join(lines)


def noisy(noise: random.Random) -> bytes:
    """Bytes that need not be text."""
    return noise.choice(SOURCES).encode()[: noise.randint(0, 400)] + noise.randbytes(noise.randint(0, 40))


def generate(number: int) -> str | bytes:
    noise = random.Random(f"{SEED}/{number}")
    kind = number % 10
    if kind == 0:
        return noisy(noise)
    return grown(noise) if kind < 4 else mutated(noise)


@pytest.mark.slow
def test_generated_files_load_or_fail_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "needle").symlink_to(CONFIGS / "needle")
    outcomes = {"loaded": 0, "deployed": 0, "refused": 0}
    for number in range(COUNT):
        content = generate(number)
        path = write(tmp_path, content)
        message, reached = "", "refused"
        try:
            load_config(path)
            reached = "loaded"
            assert isinstance(load_deployment(path), Deployment)
            reached = "deployed"
        except ConfigError as error:
            message = str(error)
        except Exception as error:  # noqa: BLE001 - any other is a find, to be shown with its file
            pytest.fail(f"file {number} of seed {SEED}: {type(error).__name__}: {error}\n{content!r}")
        outcomes[reached] += 1
        context = f"file {number} of seed {SEED}: {message!r}\n{content!r}"
        assert len(message.splitlines()) <= 1, context
        assert message.isprintable(), context
        assert not message or re.match(rf"{re.escape(str(path))}:(\d+: )?.", message), context
        assert len(message) < 600 + len(str(path)), context
    assert sum(outcomes.values()) == COUNT
    if COUNT >= 1000:  # all three ways are taken often: the generator does not only make rubbish
        assert min(outcomes.values()) > COUNT // 100, outcomes
