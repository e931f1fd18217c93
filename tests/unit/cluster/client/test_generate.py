"""The blocking client is what its generator makes of the one for asyncio."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest

from cluster.client import generate
from cluster.client.async_client import AsyncClient
from cluster.client.async_jobs import AsyncJob
from cluster.client.client import Client
from cluster.client.documents.async_documents import AsyncDocuments
from cluster.client.documents.documents import Documents
from cluster.client.jobs import Job


@pytest.mark.parametrize("source", generate.SOURCES, ids=lambda path: path.name)
def test_the_committed_client_is_current(source: Path) -> None:
    current = generate.target_of(source).read_text()
    assert generate.generate(source) == current, "it is old: run python -m cluster.client.generate"
    assert current.startswith(generate.header_of(source))


def test_a_stale_client_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(source, tmp_path)) for source in generate.SOURCES[:2]]
    monkeypatch.setattr(generate, "SOURCES", copies)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    stale = generate.target_of(copies[1])
    stale.write_text(stale.read_text() + "# by hand\n")
    assert generate.main(["--check"]) == 1


@pytest.mark.parametrize("source", generate.SOURCES, ids=lambda path: path.name)
def test_nothing_of_asyncio_is_left(source: Path) -> None:
    code = generate.target_of(source).read_text().removeprefix(generate.header_of(source))
    assert not re.findall(r"(?i)\w*async\w*|await|aclose|__a\w+__", code)


@pytest.mark.parametrize(
    ("asynchronous", "blocking"),
    [
        ("async def f() -> AsyncIterator[AsyncJob]:\n    yield (await g(h(1))).x\n",
         "def f() -> Iterator[Job]:\n    yield g(h(1)).x\n"),
        ("class _AsyncCalls:\n    # sync: @property\n    async def result(self) -> int:\n        return 1\n",
         "class _Calls:\n    @property\n    def result(self) -> int:\n        return 1\n"),
        ("async with a as b:\n    print((await b.result()).text)\n", "with a as b:\n    print(b.result.text)\n"),
        ("await asyncio.sleep(1)\nawait x.aclose()\n", "time.sleep(1)\nx.close()\n"),
        ("import asyncio\n\na = await asyncio.to_thread(read, b, c)\n", "a = read(b, c)\n"),
        ("import asyncio\n\nasyncio.sleep(1)\n", "import time\n\ntime.sleep(1)\n"),
    ],
)  # fmt: skip
def test_rules(asynchronous: str, blocking: str) -> None:
    assert generate.convert(asynchronous, Path("client.py")) == blocking


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
