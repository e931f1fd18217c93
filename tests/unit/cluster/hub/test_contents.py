"""Which files of a repository are downloaded, and when a folder has all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.hub.contents import choose_files, choose_gguf, lacking, lacks_only_tokenizer
from cluster.hub.names import HubError, HubName

NAME = HubName("huggingface", "o/n")
SETTINGS = ["config.json", "config_1m.json", "generation_config.json", "model.safetensors.index.json"]
TEXT = ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
REST = [
    "LICENSE", "README.md", ".gitattributes", "consolidated.safetensors", "original/model.safetensors",
    "pytorch_model.bin", "training_args.bin", "onnx/config.json",
]  # fmt: skip


def gguf(file: str) -> HubName:
    return HubName("huggingface", "o/n", None, file)


def test_only_what_is_needed_is_chosen():
    files = [*SETTINGS, *TEXT, *SHARDS, *REST]
    assert choose_files(NAME, files, "config") == sorted(SETTINGS)
    assert choose_files(NAME, files, "tokenizer") == sorted(SETTINGS + TEXT)
    assert choose_files(NAME, files, "weights") == sorted(SETTINGS + TEXT + SHARDS)


def test_weights_may_have_one_name_only():
    assert choose_files(NAME, ["config.json", "consolidated.safetensors"], "weights")[-1] == "consolidated.safetensors"
    assert choose_files(gguf("q8_0"), ["n-Q8_0.gguf", "config.json"], "config") == ["n-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["README.md"], "o/n: holds no config.json: name the repository of a language model"),
        (["n-Q8_0.gguf", "n-Q4_0.gguf"], "o/n: holds GGUF files: name one, such as o/n:n-Q4_0.gguf"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "o/n: holds a LoRA adapter (adapter_config.json): merge",
        ),
        (
            ["config.json", "pytorch_model.bin"],
            "holds PyTorch pickles, which can run code (pytorch_model.bin): convert",
        ),
        (["config.json", "README.md"], "o/n: holds no safetensors: name a repository that has them"),
    ],
)
def test_other_repositories_are_refused_before_a_download(files: list[str], said: str):
    with pytest.raises(HubError) as caught:
        choose_files(NAME, files, "weights")
    assert said in str(caught.value)


def test_a_gguf_file_is_named_or_meant_by_its_kind():
    files = ["n-Q4_K_M.gguf", "n.q8_0.gguf", "big/n-Q6_K-1.gguf", "n-IQ4_K_M.gguf"]
    assert choose_gguf(gguf("n-Q4_K_M.gguf"), files) == "n-Q4_K_M.gguf"
    assert choose_gguf(gguf("q4_k_m"), files) == "n-Q4_K_M.gguf"
    assert choose_gguf(gguf("Q8_0"), files) == "n.q8_0.gguf"
    with pytest.raises(HubError, match=r"there is no such file: there are big/n-Q6_K-1.gguf, n-IQ4_K_M.gguf, n-Q4_K_M"):
        choose_gguf(gguf("other.gguf"), files)
    with pytest.raises(HubError, match=r"more than one file is meant: name one of a-F16.gguf, b-F16.gguf"):
        choose_gguf(gguf("f16"), ["a-F16.gguf", "b-F16.gguf", "c.gguf"])
    with pytest.raises(HubError, match="the repository has no GGUF files"):
        choose_gguf(gguf("f16"), ["config.json"])


def test_a_folder_that_lacks_something(tmp_path: Path):
    assert lacking(tmp_path, "config") == ["config.json"]
    assert lacking(tmp_path, "weights") == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    (tmp_path / "config.json").write_text("{}")
    assert lacking(tmp_path, "config") == []
    assert lacking(tmp_path, "tokenizer") == ["tokenizer.json"]
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / SHARDS[0]).write_bytes(b"")
    (tmp_path / SHARDS[1]).symlink_to("absent")  # as the cache links to files
    assert lacking(tmp_path, "weights") == [SHARDS[1], "tokenizer.json"]
    (tmp_path / "absent").write_bytes(b"")
    assert lacks_only_tokenizer(lacking(tmp_path, "weights"))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert lacking(tmp_path, "weights") == []
    assert not lacks_only_tokenizer([])
