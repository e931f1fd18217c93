"""Ray without Ray: records what is asked of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.stages import ray_cluster


class FakeRay(ModuleType):
    """Records what was called; one node with four CPUs unless `resources` says else."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[str] = []
        self.started: dict[str, Any] = {}
        self.locals: list[Any] = []  # every start of a local Ray
        self.settings: dict[str, str] = {}  # of this process, while it connects
        self.is_running = False
        self.session = "/"  # its folder
        self.error: BaseException | None = None
        self.has_place = True
        self.resources: list[dict[str, float]] = [{"CPU": 4.0}]
        self.exceptions = SimpleNamespace(
            RayError=type("RayError", (Exception,), {}), GetTimeoutError=type("GetTimeoutError", (Exception,), {}),
            RayTaskError=type("RayTaskError", (Exception,), {"cause": None}),
        )  # fmt: skip

    def init(self, **options: Any) -> Any:
        self.started = options
        self.is_running = True
        if self.error is not None:
            raise self.error
        return SimpleNamespace(address_info={"session_dir": self.session})

    def is_initialized(self) -> bool:
        return self.is_running

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.is_running = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": one} for one in self.resources] + [
            {"Alive": False, "Resources": {"CPU": 99.0}}
        ]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def get(self, calls: list[Any], timeout: float) -> list[Any]:
        if self.error is not None:
            raise self.error
        return calls

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> None:
        self.calls.append(f"wait for {num_returns}")

    def kill(self, actor: str) -> None:
        self.calls.append(f"kill {actor}")
        if self.error is not None:
            raise self.error

    def remote(self, actor_class: type) -> Any:
        def options(**given: Any) -> Any:
            self.calls.append(
                f"{given['num_cpus']:g} CPU, {given['num_gpus']:g} GPU, bundle {given['scheduling_strategy']}"
            )
            return SimpleNamespace(remote=actor_class)

        return SimpleNamespace(options=options)


class FakeLocalRay:
    token, folder = "secret", Path("/run/ray")

    def __init__(self, ray: FakeRay, on_lost: Callable[[str], None]) -> None:
        self._ray = ray
        self.lose = on_lost

    def address(self, timeout_s: float) -> str:
        return "127.0.0.1:1234"

    def close_folders(self) -> None:
        self.was_connected = self._ray.is_running

    def close(self) -> None:
        self._ray.calls.append("end Ray")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    groups, strategies = ModuleType("groups"), ModuleType("strategies")

    def placement_group(bundles: list[dict[str, float]], strategy: str) -> Any:
        fake.calls.append(f"{strategy} {bundles}")
        return SimpleNamespace(wait=lambda timeout_s: fake.has_place)

    groups.placement_group = placement_group  # type: ignore[attr-defined]
    groups.remove_placement_group = lambda group: fake.calls.append("remove group")  # type: ignore[attr-defined]
    strategies.PlacementGroupSchedulingStrategy = (  # type: ignore[attr-defined]
        lambda group, placement_group_bundle_index: placement_group_bundle_index
    )
    modules = {
        "ray": fake, "ray.util": ModuleType("util"), "ray.util.placement_group": groups,
        "ray.util.scheduling_strategies": strategies,
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def start(on_lost: Callable[[str], None]) -> FakeLocalRay:
        fake.locals.append(FakeLocalRay(fake, on_lost))
        return fake.locals[-1]

    @contextmanager
    def settings(values: dict[str, str], is_local: bool) -> Iterator[None]:
        fake.settings = values
        yield

    monkeypatch.setattr(ray_cluster, "LocalRay", start)
    monkeypatch.setattr(ray_cluster, "driver_settings", settings)
    monkeypatch.setattr(ray_cluster, "read_environment", lambda: fake.calls.append("environment"))
    return fake
