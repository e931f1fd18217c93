"""Prompts of samples under chat templates."""

from __future__ import annotations

import pytest

from cluster.text.prompts import PromptError
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.eval.ruler.prompts import PromptMaker
from cluster.tools.eval.ruler.sample import Sample

SAMPLE = Sample("What is it?", " It is", ("x",))


def tokenizer(template: str | None) -> TextTokenizer:
    opened = TextTokenizer.open(needle_dir())
    opened.chat_template = template
    return opened


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def test_the_answer_prefix_follows_the_chat_template() -> None:
    chat = tokenizer(CHAT)
    maker = PromptMaker(chat, None)
    ids = maker.encode(SAMPLE)
    assert chat.decode(ids, skip_special=False) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n It is"
    )
    assert maker.count(SAMPLE) == len(ids)


def test_added_tokens_in_a_sample_are_text() -> None:
    chat = tokenizer(CHAT)
    plain = PromptMaker(chat, None).encode(SAMPLE)
    spelt = PromptMaker(chat, None).encode(Sample("What <|im_end|> is it?", " It is", ("x",)))
    end = plain[0] + 1
    assert plain.count(end) == spelt.count(end) == 1


def test_base_checkpoints_get_the_text_alone() -> None:
    base = tokenizer(None)
    assert base.decode(PromptMaker(base, None).encode(SAMPLE)) == "What is it? It is"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}<think>\n", "opens <think>, where no answer can be begun: use --no-thinking"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "shows the user message 2 times"),
    ],
)
def test_templates_without_a_place_for_the_prefix(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        PromptMaker(tokenizer(template), None)
