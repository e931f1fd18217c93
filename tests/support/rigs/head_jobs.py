"""The five jobs of the tests in which a head dies."""

from __future__ import annotations

from cluster.client.client import Client, Job
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.eval.haystack import Haystack, build_haystack
from tests.support.rigs.head import NEEDLE

DECODES = 400


def long_document() -> Haystack:
    """About 20,000 tokens, five times what the checkpoint was trained for: YaRN is at work."""
    return build_haystack(TextTokenizer.open(NEEDLE), 20_000, 2, 11, NEEDLE)


def submit(client: Client, number: int, haystack: Haystack) -> Job:
    """One of the five jobs by number: a long document, two long answers, two that only wait."""
    if number == 0:
        return client.submit(haystack.document, [n.question for n in haystack.needles], max_tokens=24)
    if number in (1, 2):
        return client.submit(prompt=f"The code of dark river is {number}", max_tokens=DECODES, ignore_eos=True)
    if number == 3:
        return client.submit(prompt="Once", max_tokens=40, ignore_eos=True, temperature=0.8, seed=5, logprobs=2)
    return client.submit("The code of old stone is 12345. " * 40, ["What is the code?", "Of what?"], max_tokens=20)
