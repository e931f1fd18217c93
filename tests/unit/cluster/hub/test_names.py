"""Names of models on hubs: what is one, and what is a path."""

from __future__ import annotations

import pytest

from cluster.hub.names import HubError, HubName


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", HubName("huggingface", "Qwen/Qwen3-30B-A3B-GPTQ-Int4")),
        ("o/n@v1.0", HubName("huggingface", "o/n", "v1.0")),
        ("o/n@refs/pr/3", HubName("huggingface", "o/n", "refs/pr/3")),
        ("o/n:sub/n-Q4_K_M.gguf", HubName("huggingface", "o/n", None, "sub/n-Q4_K_M.gguf")),
        ("o/n@abc:Q8_0", HubName("huggingface", "o/n", "abc", "Q8_0")),
        ("modelscope:Qwen/Qwen3-0.6B", HubName("modelscope", "Qwen/Qwen3-0.6B")),
        ("modelscope:o/n@main:n.gguf", HubName("modelscope", "o/n", "main", "n.gguf")),
    ],
)
def test_names_are_read_and_written_alike(text: str, name: HubName):
    assert HubName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "model", "/a/b", "./a/b", "../a/b", "~/a", "a/b/c", "a//b", "a/b/", "-a/b", "a/b.", "a/..", "a/b@", "a/b:",
        "a/b@x:", "a/b@../x", "a/b:../x.gguf", "a b/c", "other:a/b", "https://huggingface.co/a/b", "a/b\n", "ä/b",
    ],
)  # fmt: skip
def test_anything_else_is_a_path(text: str):
    assert HubName.parse(text) is None


def test_an_error_names_the_model():
    error = HubName("modelscope", "o/n", "v1").error("is missing")
    assert isinstance(error, HubError)
    assert (str(error), error.problem) == ("modelscope:o/n@v1: is missing", "is missing")
