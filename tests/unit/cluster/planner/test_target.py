"""Words for hardware become memory, counts and costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.latency.hardware import load_hardware
from cluster.planner.memory import relayout
from cluster.planner.target import cpu_target, gpu_target, have_target
from protos.errors import UserError
from tests.support.planner.models import subject

TABLE = load_hardware()


@pytest.mark.parametrize(("text", "counts"), [("h200", [1, 2, 4, 8, 16, 32, 64]), ("4xH200", [4]), ("3 x h200", [3])])
def test_gpus_of_the_table(text: str, counts: list[int], tmp_path: Path):
    target = gpu_target(TABLE, text)
    assert list(target.counts()) == counts
    assert target.memory == TABLE["h200"].memory - TABLE["h200"].reserved
    assert target.costs_of(subject(tmp_path)).seconds == TABLE["h200"].costs()
    assert target.has_rates
    assert target.costs_of(subject(tmp_path)).is_rough


def test_gpus_by_their_memory():
    target = have_target(TABLE, "2x24GB")
    assert (target.devices, target.kind) == (2, "cuda")
    assert 20 * 10**9 < target.memory < 24 * 10**9
    assert not target.has_rates
    assert have_target(TABLE, "24GiB").devices == 1


def test_the_processor_shares_its_cores_and_bandwidth(tmp_path: Path):
    target = cpu_target(TABLE, "64GB", cores=8)
    assert (target.memory, target.cores, list(target.counts())) == (64 * 10**9, 8, [1])
    assert target.name.startswith("8 x ")
    given = subject(tmp_path, "cpu")
    one, four = target.costs_of(given).seconds, target.costs_of(relayout(given, 2, 2)).seconds
    assert four[2] == pytest.approx(4 * one[2])
    assert four[1] == pytest.approx(4 * one[1])
    assert cpu_target(TABLE).memory > 1 << 20, "what is available"


@pytest.mark.parametrize("text", ["0x24GB", "2xfoo", "", "x", "-1x24GB", "2x24GB "])
def test_words_that_are_no_hardware(text: str):
    if text.strip() == "2x24GB":
        assert have_target(TABLE, text).devices == 2
        return
    with pytest.raises(UserError) as caught:
        have_target(TABLE, text)
    assert "\n" not in str(caught.value)
