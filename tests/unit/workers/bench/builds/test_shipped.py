"""Shipped launches, compiled for a GPU that is not there, keep their limits; `workers.bench compile` builds all."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from workers.bench.builds.launches import compiled_launches
from workers.bench.builds.limits import CAPABILITIES, Limits, Shipped, violations
from workers.bench.builds.shipped import shipped

SHIPPED = {one.name: one for one in shipped()}
WHOLE = ("prefill, heads of 128, int8 KV", "decode and heads, int8 KV")
PARTS = {  # launches, and those of their kernels that no other test compiles for every generation
    "selection, fixed budgets": ("merge_kernel", "share_kernel", "decide_kernel"),
    "selection, synthetic selection": ("mass_kernel",),
    "rows": (
        "add_rms_norm_kernel",
        "swiglu_kernel",
        "store_heads_kernel",
        "best_of_parts_kernel",
        "best_of_rows_kernel",
    ),
    "experts, 1024 tokens": ("route_kernel", "count_kernel", "scan_kernel", "place_kernel", "combine_kernel"),
    "decode and heads, bf16 KV": ("merge_splits_kernel",),
}
PRODUCTS = [f"{kind} products, 1024 tokens" for kind in ("int8", "int4", "float8_e4m3")]
GENERATIONS = (
    pytest.param(80, marks=pytest.mark.slow, id="sm_80"),
    pytest.param(90, id="sm_90"),
    pytest.param(100, marks=pytest.mark.slow, id="sm_100"),
)


def check(one: Shipped, capability: int, only: tuple[str, ...] | None = None) -> None:
    launches = compiled_launches(lambda: one.call(capability), capability, only)
    # before 8.9 activations are never codes
    absent = {"quantise_rows_kernel"} if capability < 89 else set()
    assert set(only or one.limits) - absent <= {launch.kernel for launch in launches}
    beyond = {
        launch.kernel: found
        for launch in launches
        if (found := violations(launch.built, one.limits.get(launch.kernel, Limits()), capability))
    }
    assert beyond == {}


@pytest.mark.slow
@pytest.mark.parametrize("one", [pytest.param(SHIPPED[name], id=name) for name in WHOLE])
def test_limits(one: Shipped) -> None:
    check(one, 90)


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("name", PARTS)
def test_small_kernels_of_every_generation(name: str, capability: int) -> None:
    check(SHIPPED[name], capability, PARTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_quantised_products_of_every_generation(name: str, capability: int) -> None:
    check(SHIPPED[name], capability, tuple(SHIPPED[name].limits))


def test_names_are_different() -> None:
    assert len(SHIPPED) == len(list(shipped()))
