"""YAML as plain values: types of scalars, lines, overrides, and where errors say they are. Whole files: test_schema."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from cluster.config.yaml_source import ConfigError, ConfigSource, Problem, dotted, read_value

TEXT = """\
model:
  path: needle
  rope_scaling: {rope_type: yarn,
    factor: 4.0}
server:
kv_cache:
  page_size: 64
"""


def source(tmp_path: Path, text: str = TEXT, **overrides: object) -> ConfigSource:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return ConfigSource(path, {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("NULL", None), ("nUll", "nUll"), ("!!null x", None),
        ("true", True), ("Yes", True), ("ON", True), ("off", False), ("No", False), ("y", "y"), ("oN", "oN"),
        ("0", 0), ("-17", -17), ("+1_000", 1000), ("010", "010"), ("0x1F", "0x1F"), ("0o7", "0o7"), ("1:30", "1:30"),
        ("9" * 30, int("9" * 30)), ("9" * 31, "9" * 31), ("!!int '5'", 5), ("!!int five", "five"),
        ("1.5", 1.5), ("1.", 1.0), (".5", 0.5), ("-.5", "-.5"), ("1_0.5", 10.5), ("1.5e+3", 1500.0), ("1.5e3", "1.5e3"),
        ("1e-1", "1e-1"), ("-.inf", -math.inf), (".Inf", math.inf), ("inf", "inf"), ("1.5e+999", math.inf),
        ("'5'", "5"), ('"on"', "on"), ("!!str 5", "5"), ("2024-01-01", "2024-01-01"), ("=", "="),
        ("[1, [a, ~]]", [1, ["a", None]]), ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("- 1\n- b", [1, "b"]), ("{yes: 1}", {"yes": 1}),
        ("|\n  two\n  lines", "two\nlines"),
    ],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_not_a_number() -> None:
    value = read_value(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize(
    "text", ["[", "a: b: c", "!x 1", "[&a 1, *a]", "{a: 1, a: 2}", "<<", "\x07", "[" * 17 + "]" * 17]
)
def test_what_is_no_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"YAML|not supported|given twice"):
        read_value(text)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("model", "path"), Problem(2, "model.path", "needle", "r")),
        (("model", "rope_scaling", "factor"), Problem(4, "model.rope_scaling.factor", "4.0", "r")),
        (("model", "rope_scaling", "mscale"), Problem(3, "model.rope_scaling.mscale", "(missing)", "r")),
        (("server", "port"), Problem(5, "server.port", "(missing)", "r")),
        (("server",), Problem(5, "server", "null", "r")),
        (("prefill",), Problem(1, "prefill", "(missing)", "r")),
        ((), Problem(1, "", "(a mapping of 3)", "r")),
    ],
)
def test_a_problem_is_at_the_nearest_key(tmp_path: Path, path: tuple[str, ...], problem: Problem) -> None:
    assert source(tmp_path).problem(path, "r") == problem


def test_overrides_have_no_line(tmp_path: Path) -> None:
    given = source(
        tmp_path,
        model__rope_scaling={"factor": 2.0},
        server__port=1,
        security__api_keys_file=Path("k"),
        model__dtype="x",
    )
    assert given.data["model"] == {"path": "needle", "rope_scaling": {"factor": 2.0}, "dtype": "x"}
    assert given.data["security"] == {"api_keys_file": "k"}
    lines = {
        ("model", "rope_scaling", "factor"): None, ("model", "rope_scaling", "mscale"): None, ("model", "path"): 2,
        ("server", "port"): None, ("server", "host"): 5, ("security",): None, ("security", "tls_key_file"): None,
        ("model", "dtype"): None, ("kv_cache", "page_size"): 7,
    }  # fmt: skip
    assert {path: given.problem(path, "").line for path in lines} == lines
    assert str(given.error(("server", "port"), "no")) == "<override>: server.port: 1: no"
    with pytest.raises(ConfigError, match=r"^<override>: model.path.x: 1: cannot be overridden: model.path is needle"):
        source(tmp_path, model__path__x=1)


def test_problems_of_single_keys_are_collected(tmp_path: Path) -> None:
    given = source(tmp_path, "a: 1\na: {b: !x 1}\n[c]: 1\nd: !x {}\n<<: {e: 1}\n")
    assert given.data == {"a": 1, "d": None}
    assert [(problem.line, problem.key, problem.value) for problem in given.problems] == [
        (2, "a", "(a mapping of 1)"), (3, "?", "(a collection)"), (4, "d", "!x"), (5, "<<", "(a merge key)"),
    ]  # fmt: skip
    assert given.problems[0].rule == "given twice; the first is on line 1"


def test_anchors_without_aliases_are_plain(tmp_path: Path) -> None:
    assert source(tmp_path, "a: &x 1\nb: &x 2\n").data == {"a": 1, "b": 2}


def test_errors_name_what_the_parser_met(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"demo.yaml:3: not valid YAML: expected '<document start>', but found '<block"
    ):
        source(tmp_path, "a: 1\n...\nb: 1\n")
    with pytest.raises(ConfigError, match=r"demo.yaml:2: not valid YAML: version minor part"):
        source(tmp_path, "%YAML 1.3\n---\na: 1\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\n" * 200_000, ":2048: not valid YAML: more than 4096 keys and values"),
        ("a: [" + "1," * 500_000 + "]", ":1: not valid YAML: more than 4096 keys and values"),
        ("a: " + "[" * 1_000_000, ":1: not valid YAML: nested deeper than 16 levels"),
        ("- " * 500_000, ":1: not valid YAML: nested deeper than 16 levels"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ":2: not valid YAML: *a: anchors and aliases"),
        ("#" * (1 << 21), ": larger than 1048576 bytes: this is not a configuration file"),
        ("model:\n\tpath: x\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: {}\nmodel: {}\n---\n", ":3: not valid YAML: but found another document"),
    ],
    ids=["keys", "items", "brackets", "dashes", "aliases", "bytes", "tab", "documents"],
)  # fmt: skip
def test_what_is_no_configuration_costs_little(tmp_path: Path, text: str, reason: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        source(tmp_path, text)
    assert time.process_time() - began < 3
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_and_line_ends_of_windows_are_fine(tmp_path: Path) -> None:
    assert source(tmp_path, "\ufeffa: 1\r\nb: 2\r\n").data == {"a": 1, "b": 2}


def test_several_problems_give_the_first_by_line() -> None:
    problems = [Problem(3, "c", "1", "r"), Problem(2, "b", "1", "r")]
    assert str(ConfigError.from_problems("f", problems)) == "f:2: b: 1: r (and 1 more)"
    assert (
        str(ConfigError.from_problems("f", [*problems, Problem(None, "a", "1", "r")]))
        == "<override>: a: 1: r (and 2 more)"
    )
    assert str(ConfigError("a\nb")) == r"a\nb"


def test_dotted() -> None:
    assert dotted(("a", 3, "b")) == "a.3.b"
    assert dotted(("x" * 100, "b")) == "x" * 57 + "....b"
