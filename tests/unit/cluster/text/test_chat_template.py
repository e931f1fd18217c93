"""Rendering of chat templates: as transformers does, bounded, sandboxed."""

from __future__ import annotations

import re

import pytest

from cluster.text import chat_template
from cluster.text.chat_template import ChatTemplateError, opens_thinking, render_chat, render_user_message
from tests.support.data.tokenizers import CHATML, NEEDLE, OPEN_THINK, TRAINED, with_template

HELLO = [{"role": "user", "content": "hello"}]


def test_templates_have_what_transformers_gives_them() -> None:
    text = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{% generation %}|{{ eos_token }}|{% endgeneration %}"
        "{{ bos_token is defined }}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "<é>"}] * 2
    assert render_chat(with_template(text), messages) == '{"role": "user", "content": "<é>"}|<|endoftext|>|False4'


def test_rendering_equals_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<u> & {{ x }}"}]
    for template in (CHATML, TRAINED, OPEN_THINK, NEEDLE.chat_template or ""):
        (expected,), _ = utils.render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        assert render_chat(with_template(template), messages) == expected


def test_opens_thinking() -> None:
    assert opens_thinking(with_template(OPEN_THINK), None)
    assert not opens_thinking(with_template(CHATML), False)
    assert not opens_thinking(with_template(None), None)


def test_a_user_message_stands_alone_without_template() -> None:
    assert render_user_message(with_template(None), "A", None) == "A"
    assert render_user_message(with_template(TRAINED), "A", None) == "A\nAnswer:"
    with pytest.raises(ChatTemplateError, match="chat_template: the model folder has none"):
        render_chat(with_template(None), HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", " in line 1: Expected"),
        ("{{ messages[7].content }}", ""),
        ("{{ raise_exception('roles must\nalternate') }}", ": roles must alternate$"),
        ("{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", "the output passes"),
        ("{{ 'x' * 10000000000 }}", r"the result of \* is too large"),
        ("{{ 10 ** 10000000 }}", r"the result of \*\* is too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", ""),
        ("{{ messages[0].content }}{{ unknown() }}", "'unknown' is undefined"),
    ],
)
def test_failing_templates_are_one_line(template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"\Achat_template: cannot be rendered[^\n]{3,270}\Z") as caught:
        render_chat(with_template(template), HELLO)
    assert re.search(reason, str(caught.value))


def test_a_giant_template_is_not_even_read() -> None:
    with pytest.raises(ChatTemplateError, match=r"\Achat_template: 2097152 characters: at most 1048576\Z"):
        render_chat(with_template("x" * (1 << 21)), HELLO)


def test_rendering_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_RENDER_SECONDS", 0.05)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 'a'.strip() %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"takes more than 0\.05 s"):
        render_chat(with_template(endless), HELLO)
