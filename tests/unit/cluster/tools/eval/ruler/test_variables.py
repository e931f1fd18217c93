"""Variable tracking."""

from __future__ import annotations

import random
import re

import pytest

from cluster.tools.eval.ruler.sample import NOISE
from cluster.tools.eval.ruler.variables import HOPS, variable_tracking


def test_chains_lead_from_the_value_to_all_outputs() -> None:
    for seed in range(30):
        (made,) = variable_tracking(4096).make(1 + seed, random.Random(seed))
        example, main = made.input.split("\n\n\n\n")
        value = re.search(r"assigned the value (\d{5}) in the text above.$", main)
        assert value is not None
        assigned = re.findall(r"^VAR ([A-Z]{5}) = (.+)$", main, re.MULTILINE)
        assert [name for name, _ in assigned] == list(made.outputs)
        assert [source for _, source in assigned] == [value[1], *(f"VAR {name}" for name in made.outputs[:-1])]
        assert len(set(made.outputs)) == HOPS + 1
        assert main.count(NOISE) == 1 + seed
        assert made.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned "
            f"the value {value[1]}, they are: "
        )
        shown = re.findall(r"^VAR ([A-Z]{3}) = ", example, re.MULTILINE)
        assert example.endswith(f"they are:  {' '.join(shown)}")
        assert len(shown) == HOPS + 1


def test_short_contexts_have_short_examples() -> None:
    noises = [
        variable_tracking(length).make(1, random.Random(0))[0].input.count(NOISE) - 1 for length in (256, 1024, 4096)
    ]
    assert noises == [1, 4, 10]


@pytest.mark.parametrize("size", [1, 60])
def test_chains_of_one_haystack(size: int) -> None:
    """Each chain stands in order, and leads from its value to its names alone."""
    samples = variable_tracking(4096, 6).make(size, random.Random(2))
    assert len({made.input.rpartition("\n")[0] for made in samples}) == 1
    names = [name for made in samples for name in made.outputs]
    assert len(set(names)) == len(names) == 6 * (HOPS + 1)
    main = samples[0].input.split("\n\n\n\n")[1]
    assigned = re.findall(r"^VAR ([A-Z]{5}) = (.+)$", main, re.MULTILINE)
    assert len(assigned) == len(names)
    for made in samples:
        value = re.search(r"assigned the value (\d{5}) in the text above.$", made.input)
        assert value is not None
        chain = [(name, source) for name, source in assigned if name in made.outputs]
        sources = [value[1], *(f"VAR {name}" for name in made.outputs[:-1])]
        assert chain == [*zip(made.outputs, sources, strict=True)]
