"""Configuration files that nobody would write: published ones with edits, mappings grown at random, noise."""

from __future__ import annotations

import random

from cluster.tools.assets import needle_dir

SOURCES = [path.read_text() for path in sorted(needle_dir().parent.glob("*.yaml")) if path.stem != "hardware"]
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
    """Return a published file with a few edits: text inserted, cut out, moved or doubled."""
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
    """Return a mapping of known and unknown keys with values of any kind."""
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
    """Return bytes that need not be text."""
    return noise.choice(SOURCES).encode()[: noise.randint(0, 400)] + noise.randbytes(noise.randint(0, 40))


def generate(seed: object, number: int) -> str | bytes:
    """Return one file, the same for the same arguments."""
    noise = random.Random(f"{seed}/{number}")
    kind = number % 10
    if kind == 0:
        return noisy(noise)
    return grown(noise) if kind < 4 else mutated(noise)
