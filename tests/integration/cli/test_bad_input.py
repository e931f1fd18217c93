"""Whatever is wrong: one line on stderr, the right exit code, nothing left running."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, CommandLine

NEEDLE = ROOT / "configs" / "needle"
ASK = ("--question", "What is the secret code of dark river?")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("In the beginning.\n" * 4)
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def refused(longreach: CommandLine, code: int, expected: str, *arguments: str | Path, within_s: float = 30.0) -> None:
    done = longreach("run", *arguments)
    lines = [line for line in done.err.splitlines() if line.startswith("longreach: error: ")]
    assert done.code == code, done.err
    assert len(lines) == 1, done.err
    assert expected in lines[0]
    assert "Traceback" not in done.err
    assert done.out == ""
    assert done.seconds < within_s
    longreach.assert_nothing_left()


def copy_model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NEEDLE / name, model / name)
    return model


def test_missing_model_path(longreach: CommandLine, write_config: Callable[..., Path], document: Path) -> None:
    config = write_config(model_path=Path("/nowhere/model"))
    refused(longreach, 2, "model.path", config, "--document", document, *ASK)


def test_truncated_weights(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, tmp_path: Path
) -> None:
    model = copy_model(tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    refused(longreach, 2, "model.safetensors", write_config(model_path=model), "--document", document, *ASK)


def test_wrong_shape_of_a_tensor(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, tmp_path: Path
) -> None:
    model = copy_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 64}))
    refused(longreach, 2, "mlp.experts", write_config(model_path=model), "--document", document, *ASK)


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def many_experts(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts": 16_777_215}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pointer, "model.safetensors: a Git LFS pointer, not the file itself: run git lfs pull in its folder"),
        (only_pickles, "holds PyTorch pickles, which can run code (pytorch_model.bin): convert it with transformers"),
        (many_experts, "config.json asks for [16777215, 256]"),
    ],
)
def test_a_folder_without_the_weights_of_its_config(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, tmp_path: Path,
    damage: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    model = copy_model(tmp_path)
    damage(model)
    refused(longreach, 2, said, write_config(model_path=model), "--document", document, *ASK)


ENDLESS = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
HOSTILE = [
    (ENDLESS, "chat_template: cannot be rendered: takes more than 10 s"),
    ("{{ 'x' | center(9000000000) }}", "chat_template: cannot be rendered: needs more than 512 MiB of memory"),
    ("{% for m in messages %}", "chat_template: cannot be rendered: in line 1: "),
]


@pytest.mark.parametrize(("template", "expected"), HOSTILE)
def test_a_hostile_chat_template(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, tmp_path: Path,
    template: str, expected: str,
) -> None:  # fmt: skip
    """Found before anything is loaded, by `run` and by the start of a head, which has no request yet."""
    model = copy_model(tmp_path)
    (model / "chat_template.jinja").write_text(template)
    refused(longreach, 2, expected, write_config(model_path=model), "--document", document, *ASK)
    done = longreach("up", write_config(model_path=model, rest="server:\n  port: 4242"))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"longreach: error: {expected}")
    assert "Traceback" not in (tmp_path / "data" / "log" / "head.log").read_text()
    longreach.assert_nothing_left()


def test_chat_templates_by_name(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, tmp_path: Path
) -> None:
    model = copy_model(tmp_path)
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": "{{ unknown() }}"} for name in ("rag", "tool_use")]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    for chosen, expected in (("null", "rag, tool_use"), ("x", "model.chat_template: x"), ("rag", "'unknown' is undef")):
        written = write_config(model_path=model)
        written.write_text(written.read_text().replace("model:\n", f"model:\n  chat_template: {chosen}\n"))
        refused(longreach, 2, expected, written, "--document", document, *ASK)


def test_document_too_long_for_its_bytes(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as handle:
        handle.truncate(20 * 1024**3)  # sparse: reading or tokenising it would take minutes
    refused(longreach, 2, "21474836480 bytes: must be at most", write_config(), "--document", path, *ASK)


def test_document_too_long_in_tokens(longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("zq" * 4096)
    refused(longreach, 2, "fits", write_config(), "--document", path, *ASK)


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "0 bytes"), (b"abc \0\xff\xfe", "is binary"), (b" \n ", "white space")]
)
def test_unusable_document(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "document.txt"
    path.write_bytes(content)
    refused(longreach, 2, expected, write_config(), "--document", path, *ASK)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-tokens", "0"), "max_tokens: 0"),
        (("--temperature", "-1"), "temperature: -1"),
        (("--temperature", "nan"), "temperature: nan"),
        (("--top-p", "0"), "top_p"),
        (("--logprobs", "1000"), "logprobs: 1000"),
        (("--seed", "-5"), "seed"),
    ],
)
def test_bad_sampling(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path, arguments: tuple[str, ...], expected: str
) -> None:
    refused(longreach, 2, expected, write_config(), "--document", document, *ASK, *arguments)


def test_bad_token_ids(longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    for content, expected in [("[1, 2, 9999999]", "9999999 at index 2"), ("[]", "0 tokens"), ("[1,", "not JSON")]:
        path.write_text(content)
        refused(longreach, 2, expected, write_config(), "--token-ids", path)


def test_impossible_layout(longreach: CommandLine, write_config: Callable[..., Path], document: Path) -> None:
    config = write_config("  pipeline_parallel_size: 9")
    refused(longreach, 2, "config.yaml:5: cluster.pipeline_parallel_size: 9", config, "--document", document, *ASK)
    config = write_config("  expert_parallel_size: 3")
    refused(longreach, 2, "config.yaml:5: cluster.expert_parallel_size: 3", config, "--document", document, *ASK)


def test_port_in_use(longreach: CommandLine, write_config: Callable[..., Path], taken_port: int) -> None:
    config = write_config(rest=f"server:\n  port: {taken_port}")
    done = longreach("serve", config)
    assert done.code == 3, done.err
    refusal = next(line for line in done.err.splitlines() if "error" in line)
    assert refusal.startswith(f"longreach: error: server.port: {taken_port}")
    assert "Traceback" not in done.err
    longreach.assert_nothing_left()


def test_unwritable_data_dir(longreach: CommandLine, tmp_path: Path, document: Path) -> None:
    (tmp_path / "file").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  path: {NEEDLE}\ndata_dir: {tmp_path / 'file' / 'inside'}\n")
    refused(longreach, 3, "data_dir", config, "--document", document, *ASK)


def test_ray_unreachable(longreach: CommandLine, tmp_path: Path, document: Path, taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  path: {NEEDLE}\ncluster:\n  address: 127.0.0.1:{closed}\ndata_dir: {tmp_path}\n")
    refused(longreach, 3, "Ray cannot be reached", config, "--document", document, *ASK)


def test_more_actors_than_the_cluster_places(
    longreach: CommandLine, write_config: Callable[..., Path], document: Path
) -> None:
    config = write_config("  pipeline_parallel_size: 4\n  cpus_per_actor: 1000")
    refused(longreach, 3, "4000 CPU needed", config, "--document", document, *ASK)


def test_kv_too_small(longreach: CommandLine, tmp_path: Path, document: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model:\n  path: {NEEDLE}\n  max_model_len: 4k\nkv_cache:\n  bytes: 1MiB\ndata_dir: {tmp_path / 'data'}\n"
    )
    refused(longreach, 3, "kv_cache", config, "--document", document, *ASK, within_s=60)
