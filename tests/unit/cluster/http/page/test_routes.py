"""The page as it is served: to everybody, with a strict policy; and what its files may not have in them."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from cluster.access.keys import ApiKeys
from cluster.http.page.routes import FILES
from tests.support.rigs.http import AnsweringService, direct_client

KEY = "0123456789abcdef"
TEXTS = {path: file.content.decode() for path, file in FILES.items()}


def test_files_are_served_to_everybody_and_data_is_not() -> None:
    async def run() -> None:
        with direct_client(AnsweringService(), ApiKeys({KEY: "a"})) as client:
            for path, file in FILES.items():
                answer = await client.get(path)
                assert (answer.status_code, answer.content) == (200, file.content)
                assert answer.headers["content-type"] == file.media_type
                again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")
                assert (await client.head(path)).content == b""
            for path in ("/v1/cluster", "/v1/jobs", "/v1/documents", "/page/nothing.js", "/page/../app.py", "/page/"):
                assert (await client.get(path)).status_code == 401, path
            unknown: httpx.Response = await client.get("/page/nothing.js", headers={"x-api-key": KEY})
            assert unknown.status_code == 404

    asyncio.run(run())


def test_the_policy_allows_nothing_from_elsewhere() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            headers = (await client.get("/")).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"

    asyncio.run(run())


@pytest.mark.parametrize("path", TEXTS)
def test_files_are_short_and_of_one_place(path: str) -> None:
    text = TEXTS[path]
    assert len(text.splitlines()) <= 400
    urls = [url for url in re.findall(r"https?://[^\s\"'`]+", text) if url != "http://www.w3.org/2000/svg"]
    assert urls == []
    if path.endswith(".js"):
        wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage|\.cookie"
        assert re.findall(wrong, text) == []


def test_everything_that_a_file_names_is_served() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"/page/[\w.]+", text)}
    named |= {f"/page/{name}" for text in TEXTS.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert named == set(FILES) - {"/"}


def test_every_element_that_a_script_names_is_there() -> None:
    there = set(re.findall(r' id="([\w-]+)"', TEXTS["/"]))
    named = {
        name for path, text in TEXTS.items() if path.endswith(".js") for name in re.findall(r'byId\("(.+?)"', text)
    }
    assert named <= there
    assert len(re.findall(r' id="', TEXTS["/"])) == len(there)


def test_every_field_has_a_label() -> None:
    fields = re.findall(r'<(?:input|textarea|select)\b[^>]* id="([\w-]+)"', TEXTS["/"])
    assert len(fields) == 6
    assert set(fields) == set(re.findall(r'<label[^>]* for="([\w-]+)"', TEXTS["/"]))
