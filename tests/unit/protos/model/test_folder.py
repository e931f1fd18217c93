"""Folders of models: the snapshot of a cache, and what is said of a folder that holds no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from protos.model.folder import explain, hub_source, on_this_node, resolve, served_name, snapshot_of

HASHES = ("0123abc", "4567def")


def cache_entry(root: Path, main: str | None = HASHES[1], snapshots: tuple[str, ...] = HASHES) -> Path:
    entry = root / "models--Qwen--Qwen3-0.6B"
    (entry / "blobs").mkdir(parents=True)
    for name in snapshots:
        (entry / "snapshots" / name).mkdir(parents=True)
        (entry / "snapshots" / name / "config.json").write_text("{}")
    if main is not None:
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(main)
    return entry


def test_an_entry_of_the_cache_is_the_snapshot_of_its_main_branch(tmp_path: Path) -> None:
    entry = cache_entry(tmp_path)
    assert resolve(entry) == entry / "snapshots" / HASHES[1]
    assert served_name(resolve(entry)) == "Qwen3-0.6B"
    assert resolve(resolve(entry)) == resolve(entry)


def test_an_only_snapshot_needs_no_branch(tmp_path: Path) -> None:
    entry = cache_entry(tmp_path, None, HASHES[:1])
    assert resolve(entry) == entry / "snapshots" / HASHES[0]


@pytest.mark.parametrize("main", [None, "", "..", "../../other", "9999999", "x" * 300, "a/b", "\x00", "\u00e9"])
def test_no_snapshot_is_guessed(tmp_path: Path, main: str | None) -> None:
    entry = cache_entry(tmp_path, main)
    assert resolve(entry) == entry
    assert explain(entry).startswith("the folder is an entry of the Hugging Face cache without a snapshot in use: name")


def test_other_paths_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "config.json", tmp_path / "snapshots"):
        assert resolve(path) == path
    assert served_name(tmp_path / "snapshots" / "x") == "x"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "the folder is empty: name the folder of a model"),
        (["README.md"], "the folder holds only README.md, ...: name"),
        (["config.json", "tokenizer.json"], "the folder holds config.json and no weights: download it again, with all"),
        (
            ["config.json", "pytorch_model.bin"],
            "holds PyTorch pickles, which can run code (pytorch_model.bin): convert",
        ),
        (["config.json", "pytorch_model.bin.index.json"], "holds PyTorch pickles"),
        (["config.json", "consolidated.00.pth", "params.json"], "a checkpoint in Meta's format (consolidated.00.pth)"),
        (["config.json", "optimizer.pt", "training_args.bin"], "holds config.json and no weights"),
        (["config.json", "flax_model.msgpack"], "weights of another framework (flax_model.msgpack): convert it"),
        (["m-Q4_K_M.gguf"], "holds GGUF weights (m-Q4_K_M.gguf): name the file itself"),
        (
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
            "holds a LoRA adapter (adapter_config.",
        ),
        (
            ["config.json", "gptq_model-4bit.safetensors", "quantize_config.json"],
            "quantized with GPTQ or AWQ (quantize_",
        ),
        (
            ["config.json", "model-00001-of-00002.safetensors"],
            "no index names the safetensors of the folder (model-0000",
        ),
        (["model.safetensors", "tokenizer.json"], "holds weights without config.json"),
        (
            ["config.json", "model.safetensors.incomplete"],
            "a download that was interrupted (model.safetensors.incomplet",
        ),
        (
            ["config.json", ".cache/huggingface/download/abc.incomplete"],
            "a download that was interrupted (abc.incomplet",
        ),
        (
            ["models--a--b/snapshots/x/config.json"],
            "is the Hugging Face cache: name one of its models, such as models-",
        ),
        (["qwen/config.json", "notes.txt"], "holds no model but folders of models: name one, such as qwen"),
    ],
)
def test_a_folder_is_explained(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    text = explain(tmp_path)
    assert said in text
    assert text.isprintable()


def test_no_folder(tmp_path: Path) -> None:
    assert explain(tmp_path / "absent") == "there is no such folder: name the folder of a model"
    for name, said in (
        ("model.safetensors", "a file, not a folder"),
        ("x.gguf", "GGUF weights (x.gguf): name the file"),
    ):
        (tmp_path / name).write_text("")
        assert explain(tmp_path / name).startswith(said)


def test_an_interrupted_download_of_a_snapshot(tmp_path: Path) -> None:
    entry = cache_entry(tmp_path)
    (entry / "blobs" / "77.incomplete").write_text("")
    assert "a download that was interrupted (77.incomplete)" in explain(resolve(entry))


def test_a_snapshot_by_branch_or_commit(tmp_path: Path) -> None:
    entry = cache_entry(tmp_path)
    (entry / "refs" / "v2").write_text(HASHES[0])
    for revision, name in (("main", HASHES[1]), ("v2", HASHES[0]), (HASHES[0], HASHES[0])):
        assert snapshot_of(entry, revision) == entry / "snapshots" / name
    for revision in ("v3", "..", "../refs", ""):
        assert snapshot_of(entry, revision) is None


def test_each_node_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "here"))
    head = tmp_path / "head" / "models--Qwen--Qwen3-0.6B" / "snapshots" / HASHES[0]
    file = head / "sub" / "q.gguf"
    assert on_this_node(head) == head  # nowhere: the error names the head's path
    assert hub_source(file) == hub_source(head) == ("Qwen/Qwen3-0.6B", HASHES[0])
    here = cache_entry(tmp_path / "here") / "snapshots" / HASHES[0]
    assert on_this_node(head) == here
    assert on_this_node(file) == file
    head.mkdir(parents=True)
    assert on_this_node(head) == head
    for other in (tmp_path / "absent", tmp_path / "models--a--b" / "x"):
        assert on_this_node(other) == other
        assert hub_source(other) is None
