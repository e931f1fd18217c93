"""Shipped launches, compiled for a GPU that is not there, keep their limits; `workers.bench compile` builds all."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from workers.bench.builds.launches import compiled_launches
from workers.bench.builds.limits import Limits, Shipped, violations
from workers.bench.builds.shipped import shipped

SHIPPED = list(shipped())
NAMES = ("prefill, heads of 128, int8 KV", "decode and heads, int8 KV", "float8_e4m3 products, 1024 tokens")
BUILDS = [pytest.param(one, 90, id=one.name) for one in SHIPPED if one.name in NAMES]
WIDE_CODES = [pytest.param(one, 100, id=f"sm_100, {one.name}") for one in SHIPPED if one.name == NAMES[-1]]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "capability"), BUILDS + WIDE_CODES)
def test_limits(one: Shipped, capability: int) -> None:
    launches = compiled_launches(lambda: one.call(capability), capability)
    # before 8.9 activations are never codes
    absent = {"quantise_rows_kernel"} if capability < 89 else set()
    assert set(one.limits) - absent <= {launch.kernel for launch in launches}
    beyond = {
        launch.kernel: found
        for launch in launches
        if (found := violations(launch.built, one.limits.get(launch.kernel, Limits()), capability))
    }
    assert beyond == {}


def test_names_are_different() -> None:
    assert len({one.name for one in SHIPPED}) == len(SHIPPED)
    assert len(BUILDS) == len(NAMES)
