"""The process that renders chat templates: whatever a template does ends within the limits, with one line."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any

import psutil
import pytest

from cluster.text.templates import process as template_process
from cluster.text.templates.process import ChatTemplateError, RendererBusy, RenderLimits, TemplateProcess
from cluster.text.templates.worker import Request
from tests.support.paths import ROOT

SECONDS = 0.5
ENDLESS = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess(RenderLimits(SECONDS, 256 << 20))
    yield made
    made.close()


def request(template: str, content: str = "hello", **values: Any) -> Request:
    messages = [{"role": "user", "content": content}]
    return {"template": template, "variables": {"messages": messages}, "now": "2031-02-03", "max_chars": 1000, **values}


def renders(process: TemplateProcess, text: str = "again") -> bool:
    """Return whether an honest template is rendered, however slow the machine is for the short limit of these tests."""
    for _ in range(10):
        try:
            return process.render(request(text)) == text
        except ChatTemplateError as error:
            if "takes more than" not in str(error):
                raise
    return False


def doubling(what: str, start: str) -> str:
    body = f"{{% for i in range(99) %}}{{% set ns.x = {what} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{body}{{{{ ns.x }}}}"


HOSTILE = [
    ENDLESS,
    "{% set r = range(99999) | list %}{% for i in r %}{% if r | sum < 0 %}{% endif %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% set x = r | map('string') | list %}{% endfor %}",
    doubling("ns.x * ns.x", "3"),
    "{{ 10 ** 10000000 }}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' | center(9000000000) }}",
    "{{ 'x'.ljust(9000000000) }}",
    "{{ 'x'.zfill(9000000000) }}",
    "{{ '%9000000000d' | format(1) }}",
    "{{ '%9000000000d' % 1 }}",
    "{{ '{:9000000000}'.format(1) }}",
    "{{ 'x\ny' | indent(9000000000) }}",
    doubling("ns.x ~ ns.x", "'xy'"),
    doubling("ns.x + ns.x", "'xy'"),
    doubling("ns.x + ns.x", "[1]"),
    doubling("ns.x | replace('x', ns.x)", "'x' * 1000"),
    doubling("[ns.x, ns.x] | tojson", "1"),
    doubling("[ns.x, ns.x]", "[1]"),
    "{{ ('x' * 100000000) | tojson(indent=9) }}",
    "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('x' * 1000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ raise_exception('x' * 100000000) }}",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
]


def test_whatever_a_template_does_ends_in_one_line(process: TemplateProcess) -> None:
    own = psutil.Process()
    assert renders(process)
    before = own.memory_info().rss
    for template in HOSTILE:
        began = time.monotonic()
        with pytest.raises(ChatTemplateError, match=r"\Achat_template: cannot be rendered: [^\n]{3,220}\Z"):
            process.render(request(template))
        assert time.monotonic() - began < SECONDS + 5, template[:60]
        assert renders(process), "the next request is served"
    assert own.memory_info().rss - before < 32 << 20


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10000000000 }}", "needs more than 256 MiB of memory"),
        ("{{ 'x' * 1001 }}", "the output passes 1000 characters"),
        ("{{ unknown() }}", "'unknown' is undefined"),
    ],
)
def test_the_line_names_the_limit(template: str, reason: str) -> None:
    process = TemplateProcess(RenderLimits(20.0, 256 << 20))
    with pytest.raises(ChatTemplateError, match=rf"^chat_template: cannot be rendered: {reason}$"):
        process.render(request(template))
    process.close()


def test_the_line_names_the_limit_of_time(process: TemplateProcess) -> None:
    with pytest.raises(ChatTemplateError, match=r"^chat_template: cannot be rendered: takes more than 0.5 s$"):
        process.render(request(ENDLESS))


def test_the_child_is_kept_and_knows_nothing(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_API_KEY", "secret")
    assert renders(process)
    child = psutil.Process(_pid(process))
    assert set(child.environ()) <= {"LD_LIBRARY_PATH"}
    assert len(os.listdir(f"/proc/{child.pid}/fd")) == 3, "standard input, output and error"
    limits = {resource.RLIMIT_AS: 256 << 20, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    assert {kind: resource.prlimit(child.pid, kind) for kind in limits} == {k: (v, v) for k, v in limits.items()}
    assert os.getsid(child.pid) == child.pid, "Ctrl-C in a terminal does not reach it"
    assert all(renders(process, str(index)) for index in range(50))
    assert _pid(process) == child.pid


def test_a_large_message_goes_through() -> None:
    process = TemplateProcess()
    for content in ("a" * 4_000_000, "漢é" * 500_000, "\ud800"):
        rendered = process.render(request("<{{ messages[0].content }}>", content, max_chars=len(content) + 2))
        assert rendered == f"<{content}>"
    process.close()


def test_a_child_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    for _ in range(3):
        assert renders(process)
        pid = _pid(process)
        os.kill(pid, signal.SIGKILL)
        assert renders(process)
        assert _pid(process) != pid


def test_a_child_that_is_killed_while_it_renders() -> None:
    process = TemplateProcess(RenderLimits(20.0))
    assert renders(process)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(process.render, request(ENDLESS))
        pids = _kill_until_done(process, endless)
        with pytest.raises(ChatTemplateError, match=r"the process that renders it ended.*SIGKILL"):
            endless.result(10)
    assert renders(process)
    assert not any(map(psutil.pid_exists, pids)), "no zombie is left"
    process.close()
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_a_stopped_child_is_replaced(process: TemplateProcess) -> None:
    assert renders(process)
    os.kill(_pid(process), signal.SIGSTOP)
    with pytest.raises(ChatTemplateError, match="takes more than"):
        process.render(request("y"))
    assert renders(process)


@pytest.mark.parametrize("template", ["x", ENDLESS])
def test_the_child_ends_with_its_owner(template: str) -> None:
    """SIGKILL of the owner, while the child waits and while it renders."""
    program = (
        "from cluster.text.templates.process import *\n"
        "process = TemplateProcess(RenderLimits(60.0))\n"
        "request = lambda t: {'template': t, 'variables': {}, 'now': '2031-02-03', 'max_chars': 10}\n"
        "process.render(request('x')); print(process._child.pid, flush=True)\n"
        f"process.render(request({template!r})); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        time.sleep(0.3)
        owner.kill()
    _gone(pid)


def test_requests_wait_for_each_other_but_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_SLOW_SECONDS", 0.1)
    process = TemplateProcess(RenderLimits(50.0))
    process.render(request("x"))
    with ThreadPoolExecutor(16) as pool:
        endless = pool.submit(process.render, request(ENDLESS))
        time.sleep(0.5)
        others = [pool.submit(process.render, request("x")) for _ in range(12)]
        refused = list(islice(as_completed(others, 40), 8))  # at once; four wait
        _kill_until_done(process, endless)
        results = [other.exception(40) for other in others]
    assert [type(error) for error in results if error is not None] == [RendererBusy] * 8
    assert [other.exception() for other in others if other not in refused] == [None] * 4
    process.close()


def test_many_threads_are_served() -> None:
    process = TemplateProcess()
    render: Callable[[int], str] = lambda index: process.render(request("{{ messages[0].content }}", str(index)))  # noqa: E731
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(render, range(500))) == [str(index) for index in range(500)]
    assert threading.active_count() < 50
    process.close()


def test_an_interpreter_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    for executable in ("/bin/false", "/nonexistent"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ChatTemplateError, match=r"\Achat_template: cannot be rendered: [^\n]+\Z"):
            process.render(request("x"))


def _pid(process: TemplateProcess) -> int:
    assert process._child is not None
    return process._child.pid


def _kill_until_done(process: TemplateProcess, rendering: Future[str]) -> list[int]:
    """Kill each child that renders a request, which has another try when its child may have been killed before it."""
    pids: list[int] = []
    while not rendering.done():
        time.sleep(0.3)
        if (pid := _pid(process)) not in pids:
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)
            _gone(pid)
    return pids


def _gone(pid: int) -> None:
    """Wait until a process is gone or a zombie of its parent."""
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, f"{pid} lives"
        time.sleep(0.02)


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)
