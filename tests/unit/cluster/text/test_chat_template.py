"""Rendering of chat templates: as transformers does, bounded, sandboxed."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from cluster.text.chat_template import render_chat, render_user_message
from cluster.text.templates.process import ChatTemplateError
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


def test_the_clock_is_what_it_is_told() -> None:
    tokenizer = with_template("{{ strftime_now('%d %B %Y %H:%M:%S.%f %Z') }}|{{ messages[0].content }}")
    then = datetime(2031, 2, 3, 4, 5, 6, 789)
    assert render_chat(tokenizer, HELLO, now=then) == "03 February 2031 04:05:06.000789 |hello"
    assert render_user_message(tokenizer, "a", None, then) == "03 February 2031 04:05:06.000789 |a"
    year = render_chat(with_template("{{ strftime_now('%Y') }}"), HELLO)
    assert int(year) >= 2026, "the clock of the machine, when none is given"


def test_lots_fall_alike_every_time() -> None:
    tokenizer = with_template("{{ range(1000) | random }} {{ lipsum(n=1, html=false) }}")
    assert render_chat(tokenizer, HELLO) == render_chat(tokenizer, HELLO)


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
        ("{{ 'x' * 10000000000 }}", "needs more than 512 MiB of memory"),
        ("{{ 'x' * 10000000 }}", "the output passes 1048616 characters"),
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
