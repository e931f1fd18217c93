"""The shipped table loads, rows are checked, and rates become costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.yaml_source import ConfigError
from cluster.latency.hardware import find_device, load_hardware, processor
from cluster.latency.step_work import UNITS
from protos.errors import UserError

ROW = "{name: Mine, kind: gpu, memory: 10GiB, reserved: 1GiB, tflops: 100, bandwidth: 1TB, link: 10GB, linear: 0.5, \
attention: 0.25, estimate: 0.1, memory_share: 0.5, layer_us: 50, measured: false}"


def table_file(folder: Path, row: str, key: str = "mine") -> Path:
    path = folder / "hardware.yaml"
    path.write_text(f"devices:\n  {key}: {row}\n")
    return path


def test_the_shipped_table():
    table = load_hardware()
    assert {"h200", "h100", "a100", "rtx4090", "cpu-amx", "cpu-avx512", "cpu-other"} <= set(table)
    for device in table.values():
        costs = device.costs()
        assert len(costs) == len(UNITS)
        assert min(costs) > 0
    assert 140 < find_device(table, "H200").memory / 2**30 < 141


def test_costs_are_the_reached_share_of_rates(tmp_path: Path):
    device = find_device(load_hardware(table_file(tmp_path, ROW)), "mine")
    assert device.usable == 9 << 30
    assert device.costs() == pytest.approx((50e-6, 2e-12, 2e-14, 2e-12, 4e-14, 1e-13, 1e-10))
    amx = load_hardware()["cpu-amx"]
    one, four = amx.costs(1), amx.costs(4, sharers=2)
    assert four[2] == pytest.approx(one[2] / 4), "cores add up"
    assert four[1] == pytest.approx(2 * one[1]), "shards share the bandwidth"


def test_rows_of_another_table_come_first(tmp_path: Path):
    table = load_hardware(table_file(tmp_path, ROW, key="h200"))
    assert table["h200"].name == "Mine"
    assert "h100" in table


def test_a_processor_is_found_by_its_flags():
    table = load_hardware()
    assert processor(table, ["avx2", "avx512f", "amx_bf16"]) is table["cpu-amx"]
    assert processor(table, ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]) is table["cpu-amx"]
    assert processor(table, ["avx2", "avx512f", "avx512_bf16"]) is table["cpu-avx512-bf16"]
    assert processor(table, ["avx2", "avx512f"]) is table["cpu-avx512"]
    assert processor(table, []) is table["cpu-other"]
    with pytest.raises(UserError, match="no cpu row fits"):
        processor({"h200": table["h200"]}, ["avx2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tflops: 100", "tflops: 0"), r"hardware.yaml:2: devices.mine.tflops: 0: must be a number above 0"),
        (("linear: 0.5", "linear: 1.5"), r"devices.mine.linear: 1.5: must be a share"),
        (("link: 10GB, ", ""), r"devices.mine.link: .*required; must be a size in bytes"),
        (("name: Mine", "name: Mine, colour: red"), r"devices.mine.colour: red: unknown key; valid keys: name"),
        (("memory: 10GiB", "memory: 1GiB"), r"devices.mine.memory: .*required for a gpu, and above reserved"),
        (("kind: gpu", "kind: cpu"), r"devices.mine.flags: .*required for a cpu"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path: Path, change: tuple[str, str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_hardware(table_file(tmp_path, ROW.replace(*change)))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_names_the_others():
    with pytest.raises(UserError, match=r"gpu: h2: must be one of b200, h200, .* \(--hardware FILE\)"):
        find_device(load_hardware(), "h2")
    with pytest.raises(UserError, match="gpu: cpu-amx: must"):
        find_device(load_hardware(), "cpu-amx")
