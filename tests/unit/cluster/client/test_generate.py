"""The blocking client is what its generator makes of the one for asyncio."""

from __future__ import annotations

import inspect
import re

import pytest

from cluster.client import generate
from cluster.client.async_client import AsyncClient, AsyncDocuments, AsyncJob
from cluster.client.client import Client, Documents, Job


def test_the_committed_client_is_current() -> None:
    current = generate.generate(generate.SOURCE.read_text())
    assert generate.TARGET.read_text() == current, "client.py is old: run python -m cluster.client.generate"
    assert generate.TARGET.read_text().startswith(generate.HEADER)
    assert generate.main(["--check"]) == 0


def test_a_stale_client_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    stale = tmp_path / "client.py"
    stale.write_text(generate.TARGET.read_text() + "# by hand\n")
    monkeypatch.setattr(generate, "TARGET", stale)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_nothing_of_asyncio_is_left() -> None:
    assert not re.findall(
        r"(?i)\w*async\w*|await|aclose|__a\w+__", generate.TARGET.read_text().removeprefix(generate.HEADER)
    )


@pytest.mark.parametrize(
    ("asynchronous", "blocking"),
    [
        ("async def f() -> AsyncIterator[AsyncJob]:\n    yield (await g(h(1))).x\n",
         "def f() -> Iterator[Job]:\n    yield g(h(1)).x\n"),
        ("class _AsyncCalls:\n    # sync: @property\n    async def result(self) -> int:\n        return 1\n",
         "class _Calls:\n    @property\n    def result(self) -> int:\n        return 1\n"),
        ("async with a as b:\n    print((await b.result()).text)\n", "with a as b:\n    print(b.result.text)\n"),
        ("await asyncio.sleep(1)\nawait x.aclose()\n", "time.sleep(1)\nx.close()\n"),
    ],
)  # fmt: skip
def test_rules(asynchronous: str, blocking: str) -> None:
    assert generate.generate(asynchronous) == generate.HEADER + blocking


@pytest.mark.parametrize(
    ("blocking", "asynchronous"), [(Client, AsyncClient), (Job, AsyncJob), (Documents, AsyncDocuments)]
)
def test_async_classes_have_the_same_methods(blocking: type, asynchronous: type) -> None:
    def public(kind: type) -> dict[str, list[str]]:
        members = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
        calls = {name: getattr(member, "fget", None) or member for name, member in members.items()}
        return {n: list(inspect.signature(getattr(c, "__func__", c)).parameters) for n, c in calls.items()}

    assert public(blocking) == public(asynchronous)
    assert list(inspect.signature(blocking).parameters) == list(inspect.signature(asynchronous).parameters)
