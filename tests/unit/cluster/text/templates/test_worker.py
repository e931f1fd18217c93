"""The program that renders: its environment is that of transformers. Its limits: test_process."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from cluster.text.templates.worker import Request, render


def request(template: str, **variables: Any) -> Request:
    return {"template": template, "variables": variables, "now": "2031-02-03T04:05:06", "max_chars": 1000}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{{ x }}{% endgeneration %}", "a<é>"),
        ("{{ {'a': x} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': x} | tojson(ensure_ascii=true, sort_keys=true, indent=1) }}",
         json.dumps({"a": "<é>", "b": 1}, indent=1)),
        ("{{ strftime_now('%d.%m.%y') }} {{ strftime_now is defined }}", "03.02.31 True"),
        ("{{ y is defined }}", "False"),
    ],
)  # fmt: skip
def test_templates_have_what_transformers_gives_them(template: str, expected: str) -> None:
    assert render(request(template, x="<é>")) == expected


@pytest.mark.parametrize(
    "template",
    ["{{ x.__class__.__mro__ }}", "{{ x.append(1) }}", "{{ strftime_now.__globals__.os }}", "{{ cycler.__init__.x }}"],
)
def test_templates_stay_in_the_sandbox(template: str) -> None:
    with pytest.raises(jinja2.exceptions.SecurityError):
        render(request(template, x=[]))


def test_output_is_bounded_while_it_is_written() -> None:
    assert len(render(request("{{ 'x' * 1000 }}"))) == 1000
    with pytest.raises(jinja2.TemplateRuntimeError, match=r"^the output passes 1000 characters$"):
        render(request("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"))


def test_lots_fall_alike_every_time() -> None:
    drawn = request("{{ range(99999) | random }} {{ lipsum(n=1, html=false, min=2, max=9) }}")
    assert render(drawn) == render(drawn)
