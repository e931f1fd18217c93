"""Launches that compile for a GPU that is not there, from the very calls that would start the kernels.

Triton asks its driver for the device and then looks at the arguments: types, constants, and which numbers are 1 or
multiples of 16. Here the driver names the wanted compute capability and nothing is started, so tensors may be on the
device `meta`. The interpreter must be off when the kernels are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from workers.bench.builds.readback import Built, read_back


class Launch(NamedTuple):
    """One compiled kernel by its name."""

    kernel: str
    built: Built


class Device:
    """Stands for a GPU of a compute capability such as 90; every one is a device of its own to Triton's caches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def compiled_launches(call: Callable[[], object], capability: int, only: Collection[str] | None = None) -> list[Launch]:
    """Return the kernels that `call` launches, compiled for a compute capability, each build once.

    Args:
        only: the names of those that are compiled; by default all.

    Raises:
        Exception: what Triton raises for a kernel that it cannot compile.
    """
    kernels: dict[int, Any] = {}
    with _compiling(capability, kernels, only):
        call()
    return [
        Launch(one.metadata.name, read_back(one.asm["cubin"], int(one.metadata.shared), one.metadata.num_warps))
        for one in kernels.values()
    ]


@contextmanager
def _compiling(capability: int, kernels: dict[int, Any], only: Collection[str] | None) -> Iterator[None]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if only is not None and self.__name__ not in only:
            return None
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels[id(kernel)] = kernel
        return kernel

    before = driver._active
    driver.set_active(Device(capability))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = before
