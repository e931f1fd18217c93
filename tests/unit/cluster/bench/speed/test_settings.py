"""Files of benchmarks: what they may say, and the one line that tells what is wrong."""

from pathlib import Path

import pytest

from cluster.bench.speed.settings import Bench, load_bench
from cluster.config.yaml_source import ConfigError

GOOD = "bench: prefill\nconfig: single.yaml\nlengths: [4K, 1000]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "speed.yaml"
    path.write_text(GOOD)
    return path


def test_paths_are_relative_to_the_file_and_counts_are_read(file: Path):
    bench = load_bench(file)
    assert bench.settings.config == file.parent / "single.yaml"
    assert bench.settings.lengths == [4096, 1000]
    assert (bench.settings.repeats, bench.settings.layouts) == (3, [[1, 1]])
    assert bench.overrides == {}


def test_overrides_go_over_the_file(file: Path):
    more = {"model": "/models/x", "lengths": [64], "settings": {"kv_cache.dtype": "int8"}, "repeats": 7}
    bench = load_bench(file, more)
    assert bench.settings.repeats == 7
    assert bench.overrides == {
        "model.path": "/models/x", "model.served_model_name": None, "kv_cache.dtype": "int8",
    }  # fmt: skip


def test_what_goes_into_a_result_names_no_folders(file: Path):
    shown = load_bench(file, {"model": "/models/x"}).as_json()
    assert (shown["file"], shown["model"], shown["config"]) == ("speed.yaml", "x", "single.yaml")
    assert str(file.parent) not in str(shown)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bench: speed\nconfig: a.yaml\n", "1: bench: speed: must be one of prefill, decode, scaling, compare"),
        ("bench: decode\n", "config: (missing): required; must be the path of a deployment's YAML file"),
        (GOOD + "length: [1]\n", "4: length: (a list of 1): unknown key; valid keys: bench, config"),
        (GOOD + "layouts: [[1, 1, 1]]\n", "4: layouts: (a list of 1): must be a list of [stages, shards]"),
        (GOOD + "layouts: [[0, 1]]\n", "must be a list of [stages, shards]"),
        (GOOD + "max_others: 2\n", "4: max_others: 2: must be a number from 0 to 1"),
        (GOOD + "repeats: 0\n", "4: repeats: 0: must be a whole number from 1 to 1000"),
        (GOOD + "scaling: [big]\n", "must be a list of strong, weak, throughput"),
        (GOOD + "modes: {}\n", "modes: (a mapping of 0): must be a mapping of names to dotted keys"),
        (GOOD + "peers:\n  a: {kind: openai}\n", "peers.a.url: (missing): required for kind openai"),
        (GOOD + "peers:\n  a: {kind: other}\n", "peers.a.kind: other: must be one of transformers, vllm"),
        (GOOD + "peers:\n  longreach: {kind: vllm}\n", "is the name of our own engine; choose another one"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, expected: str, tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_bench(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_may_be_dotted_or_nested_and_the_later_one_counts(file: Path):
    more = {"settings": {"kv_cache.dtype": "auto", "kv_cache": {"dtype": "int8"}}, "modes": {"a": {"sparse": {}}}}
    bench = load_bench(file, more)
    assert bench.overrides == {"kv_cache.dtype": "int8"}
    assert bench.of_mode("a") == {"kv_cache.dtype": "int8", "sparse": {}}
    changed = load_bench(file, {"settings.kv_cache.page_size": 32})
    assert changed.overrides == {"kv_cache.page_size": 32}


def test_a_bench_is_a_value(file: Path):
    assert load_bench(file) == Bench(str(file), load_bench(file).settings)
