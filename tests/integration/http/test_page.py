"""The page in a browser: documents, questions, streams, the key, hostile texts, the keyboard, what axe-core finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.access.keys import ApiKeys
from cluster.engine.outputs import OutputToken
from cluster.http.native.shapes import token_events
from cluster.jobs.model import JobInput, JobSpec, JobState, NotAllowedNow
from cluster.server.head import Head
from protos.jobs.sampling import AnswerOptions
from tests.support.browser import Visit, accessibility_problems, open_browser
from tests.support.fakes.runtime import CHUNK, FakeRuntime
from tests.support.rigs.head import free_port, until
from tests.support.rigs.http import AnsweringService, serving_http

KEY = "0123456789abcdef"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>"\'>&amp;'
OpenPage = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[OpenPage]:
    visits: list[Visit] = []

    def start(url: str, **options: Any) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.close()


class LiveHead:
    """A whole head over a shard that computes as many steps as a test lets it."""

    def __init__(self, folder: Path) -> None:
        self.runtime = FakeRuntime(folder, http_port=free_port())
        self.runtime.start()
        self.head = Head(self.runtime.deployment, runtime=self.runtime)
        self.head.start()
        self.url = self.head.service.http_url
        self.service = self.head.service

    def newest(self) -> Any:
        return self.service.jobs([], {}, 1, "")[0][0]

    def close(self) -> None:
        self.runtime.shard.let(10_000)
        self.head.close()
        self.runtime.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveHead]:
    made = LiveHead(tmp_path)
    yield made
    made.close()


def described(service: AnsweringService, **attention: Any) -> AnsweringService:
    """A service whose jobs end with a report about sparse layers, and which has a document of a hostile name."""
    layers = [
        {"layer": n, "density": [0.1, 0.2], "estimated_recall": [1, 1], "estimated_recall_min": [1, 1],
         "held_out_recall": [0.97, 0.9 + n / 100], "held_out_recall_min": [0.9, 0.8], "fallbacks": [0, n]}
        for n in range(4)
    ]  # fmt: skip
    summary = {
        "mode": "sparse", "positions": "plain", "scale_len": 9, "cells": 3, "density": 0.15, "held_out_recall": 0.95,
        "held_out_recall_min": 0.8, "estimated_recall": 1.0, "estimated_recall_min": 1.0, "fallbacks": 6,
        "layers": layers,
    } | attention  # fmt: skip
    finish = service.finish

    def finish_described(job_id: str) -> Any:
        record = finish(job_id)
        answers = tuple(replace(answer, attention=summary) for answer in record.answers)
        service.records[job_id] = replace(record, answers=answers)
        return service.records[job_id]

    service.finish = finish_described  # type: ignore[method-assign]
    service.stored_kv = lambda records: {record.id: (512, 4096) for record in records}  # type: ignore[method-assign]
    service.upload(HOSTILE, [b"A text."])
    return service


def ask(page: Any, text: str, question: str = "What is the code?", longest: int = 8) -> None:
    """Fill in the form with a text and send it."""
    page.get_by_label("Text", exact=True).nth(1).fill(text)
    page.get_by_label("Question").fill(question)
    page.get_by_label("Longest answer").fill(str(longest))
    page.get_by_role("button", name="Ask", exact=True).first.click()


def test_a_document_and_its_questions(live: LiveHead, visit: OpenPage) -> None:
    """Submit, progress, the answer as it comes, cancel, ask again on the stored document, look again later."""
    tab = visit(live.url)
    page = tab.open()
    shard = live.runtime.shard
    shard.hold()
    ask(page, "The code of dark river is 4711. " * 60, longest=40)
    job = page.locator("#job")
    job.get_by_role("heading", name="What is the code?").first.wait_for()
    assert tab.focused() == "job-title"
    shard.let(2)
    bar = job.get_by_role("progressbar")
    bar.wait_for()
    until(lambda: int(bar.get_attribute("aria-valuenow") or 0) > 0)
    assert "of" in job.locator(".meta").first.inner_text()
    total = live.service.progress(live.newest().id)[0].total
    shard.let(total // CHUNK + 4)
    until(lambda: job.locator(".answer").last.inner_text().strip())
    partial = job.locator(".answer").last.inner_text()
    assert job.locator(".state").inner_text() == "decoding"
    cancel = job.get_by_role("button", name="Cancel")
    cancel.focus()
    cancel.click()
    shard.let(2)
    until(lambda: job.locator(".state").inner_text() == "cancelled")
    assert live.newest().state is JobState.CANCELLED
    assert job.locator(".answer").last.inner_text().startswith(partial)
    assert tab.focused() == "job-title"  # the button that had it is gone

    job.get_by_role("button", name="Ask again").click()
    assert tab.focused() == "question"
    assert page.get_by_label("Stored document").input_value() == live.newest().spec.input.document_id
    page.keyboard.type("And again?")
    page.get_by_label("Longest answer").fill("6")
    page.get_by_role("button", name="Ask", exact=True).first.click()
    job.get_by_role("heading", name="And again?").first.wait_for()
    page.reload()  # whoever looks later sees the same job
    job.get_by_role("heading", name="And again?").first.wait_for()
    shard.let(10_000)
    until(lambda: job.locator(".state").inner_text() == "succeeded")
    record = live.newest()
    assert job.locator(".answer").last.text_content() == record.answers[0].text.strip()
    assert page.get_by_role("status").inner_text().startswith("Answered.")
    assert page.locator("#jobs li").count() == 2
    until(lambda: page.locator("#jobs .state").first.inner_text() == "succeeded")

    page.once("dialog", lambda dialog: dialog.accept())
    job.get_by_role("button", name="Delete").click()
    until(lambda: page.locator("#jobs li").count() == 1)
    assert not job.is_visible()
    page.once("dialog", lambda dialog: dialog.dismiss())
    documents = page.locator("#documents")
    documents.get_by_role("button", name="Delete").click()
    documents.get_by_role("button", name="Pin").click()
    documents.get_by_role("button", name="Unpin").wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    documents.get_by_role("button", name="Delete").click()
    page.get_by_text("No documents yet.").wait_for()


def test_a_stream_that_breaks_goes_on(visit: OpenPage) -> None:
    service = described(AnsweringService())
    with serving_http(service) as url:
        tab = visit(url)
        page = tab.open()
        broken: list[str] = []

        def break_once(route: Any) -> None:
            broken.append(route.request.url)
            if len(broken) == 1:
                first = token_events([OutputToken(1, 0, 60, "The ", None, (), "answer", "", "The ")])
                route.fulfill(status=200, content_type="text/event-stream", body=first)
            else:
                route.continue_()

        page.route("**/events*", break_once)
        ask(page, "A text.")
        until(lambda: page.locator("#job .state").inner_text() == "succeeded")
        assert [one.rpartition("=")[2] for one in broken] == ["0", "1"]
        assert page.locator("#job .answer").last.text_content() == "The answer is forty-two."


def test_the_key_is_asked_for_and_kept_in_the_tab(visit: OpenPage) -> None:
    with serving_http(described(AnsweringService()), ApiKeys({KEY: "a"})) as url:
        tab = visit(url)
        page = tab.open()
        dialog = page.get_by_role("dialog", name="API key")
        dialog.wait_for()
        assert tab.focused() == "key"
        assert accessibility_problems(page) == []
        for wrong in ("wrong-wrong-wrong-wrong", "two words"):
            page.keyboard.type(wrong)
            page.keyboard.press("Enter")
            until(lambda: page.locator("#key-error").inner_text() != "")
            assert dialog.is_visible()
            assert page.evaluate("sessionStorage.length") == 0
            page.locator("#key-error").evaluate("(element) => { element.textContent = ''; }")
            page.locator("#key").fill("")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.locator("#health").inner_text() == "needs a key"
        page.get_by_role("button", name="API key").click()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        until(lambda: page.locator("#health").inner_text() == "serving")
        assert "Jobs of this key" in page.locator("#cluster").inner_text()
        ask(page, "A text.")
        until(lambda: page.locator("#job .state").inner_text() == "succeeded")
        kept = "[Object.values({...sessionStorage}), localStorage.length, document.cookie, location.href.includes(%r)]"
        assert page.evaluate(kept % KEY) == [[KEY], 0, "", False]
        page.reload()
        until(lambda: page.locator("#health").inner_text() == "serving")


def test_hostile_names_and_answers_are_text(visit: OpenPage) -> None:
    service = described(AnsweringService(words=(HOSTILE, "\n", HOSTILE), reasoning=(HOSTILE,)))
    service.events = [[token] for token in service.output]
    with serving_http(service) as url:
        page = visit(url).open()
        page.get_by_label("Stored", exact=True).check()
        page.get_by_label("Question").fill(HOSTILE)
        page.get_by_role("button", name="Ask", exact=True).first.click()
        until(lambda: page.locator("#job .state").inner_text() == "succeeded")
        assert page.locator("#job .answer").last.text_content() == f"{HOSTILE}\n{HOSTILE}"
        assert page.locator("#documents .name").inner_text() == HOSTILE
        assert HOSTILE in page.locator("#jobs .name").first.inner_text()
        assert page.locator("img, main script, aside script").count() == 0
        assert page.title() == "Longreach"


def test_files_that_are_no_text_are_refused_with_the_way_out(visit: OpenPage, tmp_path: Path) -> None:
    with serving_http(described(AnsweringService())) as url:
        page = visit(url).open()
        (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7 \xff\xfe")
        (tmp_path / "notes é.txt").write_text("Grüße")
        page.get_by_label("File", exact=True).check()
        page.get_by_label("Question").fill("Why?")
        submit = page.get_by_role("button", name="Ask", exact=True).first
        submit.click()
        page.get_by_text("Choose a file.").wait_for()
        page.get_by_label("Text file, UTF-8").set_input_files(tmp_path / "a.pdf")
        submit.click()
        page.get_by_text("a.pdf is not UTF-8 text").wait_for()
        page.get_by_label("Text file, UTF-8").set_input_files(tmp_path / "notes é.txt")
        submit.click()
        until(lambda: page.locator("#job .state").inner_text() == "succeeded")
        assert "notes é.txt" in page.locator("#documents").inner_text()


def test_the_keyboard_alone(visit: OpenPage) -> None:
    service = described(AnsweringService())
    with serving_http(service) as url:
        tab = visit(url)
        page = tab.open()
        tab.press_until("Tab", "text")
        page.keyboard.type("The code is 4711.")
        tab.press_until("Tab", "question")
        page.keyboard.type("What is the code?")
        tab.press_until("Tab", "submit")
        page.keyboard.press("Enter")
        until(lambda: page.locator("#job .state").inner_text() == "succeeded")
        assert tab.focused() == "job-title"
        order: list[str] = []
        for _ in range(30):
            page.keyboard.press("Tab")
            order.append(tab.focused())
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or order[-1].startswith("Longreach"), order[-1]
            if order[-1].startswith("delete-doc"):
                break
        assert order[0] == "Ask again about this document"
        assert order.index("Delete") < order.index("What is the code?") < len(order) - 1
        tab.press_until("Shift+Tab", "Ask again about this document")
        page.keyboard.press("Enter")
        assert tab.focused() == "question"


def test_recall_and_density_are_a_picture_and_a_table(visit: OpenPage) -> None:
    service = described(AnsweringService())
    with serving_http(service) as url:
        page = visit(url).open()
        ask(page, "A text.")
        picture = page.get_by_role("img", name="By layer: recall 95 % and density 15 %")
        picture.wait_for()
        assert picture.locator("circle").count() == picture.locator(".column").count() == 4
        page.get_by_text("Figures by layer").click()
        rows = page.locator("figure tbody tr")
        assert rows.count() == 4
        assert rows.nth(3).inner_text().split("\t") == ["3", "95 %", "93 %", "15 %", "10 %", "20 %", "3"]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_nothing_is_wrong_for_axe_and_nothing_too_wide(visit: OpenPage, width: int, dark: bool) -> None:
    service = described(AnsweringService(words=("a" * 300, " word" * 50)))
    with serving_http(service) as url:
        tab = visit(url, width=width, dark=dark)
        page = tab.open()
        assert accessibility_problems(page) == []
        ask(page, "A text.", question="q" * 200)
        page.locator("svg.layers").wait_for()
        page.get_by_text("Figures by layer").click()
        assert accessibility_problems(page) == []
        assert not tab.is_too_wide()


def test_a_list_that_grows_keeps_the_focus(visit: OpenPage) -> None:
    service = described(AnsweringService())
    spec = JobSpec(JobInput(prompt="a"), AnswerOptions())
    jobs = [service.submit(spec) for _ in range(45)]
    with serving_http(service) as url:
        tab = visit(url)
        page = tab.open()
        rows = page.locator("#jobs li")
        assert rows.count() == 20
        for count in (40, 45):
            page.get_by_role("button", name="Show more").click()
            until(lambda count=count: rows.count() == count)  # type: ignore[misc]
        page.get_by_role("button", name="Show more").wait_for(state="hidden")
        rows.nth(3).get_by_role("link").focus()
        for job in jobs[:3]:
            del service.records[job.id]
        service.submit(spec)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks at once
        until(lambda: rows.count() == 43)
        assert page.evaluate("document.activeElement.hash") == f"#{jobs[3].id}"


def test_what_could_not_be_done_is_said_until_something_can(visit: OpenPage) -> None:
    service = described(AnsweringService())
    pin = service.documents.pin

    def refuse(document_id: str, pinned: bool) -> Any:
        raise NotAllowedNow("it is being read")

    service.documents.pin = refuse
    with serving_http(service) as url:
        tab = visit(url)
        page = tab.open()
        pinning = page.locator("#documents").get_by_role("button", name="Pin")
        pinning.click()
        banner = page.get_by_role("alert").filter(has_text="it is being read")
        banner.wait_for()
        with page.expect_response("**/v1/documents"):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks at once
        page.wait_for_timeout(300)
        assert banner.is_visible()
        service.documents.pin = pin
        pinning.click()
        banner.wait_for(state="hidden")
        assert [one for one in tab.complaints if "409" not in one] == []
        tab.complaints.clear()


def test_a_head_that_is_gone_is_said(visit: OpenPage) -> None:
    with serving_http(described(AnsweringService())) as url:
        tab = visit(url)
        page = tab.open()
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks at once
    until(lambda: page.locator("#health").inner_text() == "not reached")
    assert "cannot be reached" in page.get_by_role("alert").first.inner_text()
    refused = [one for one in tab.complaints if "ERR_CONNECTION_REFUSED" in one]
    assert tab.complaints == refused
    tab.complaints.clear()
