"""Random selections of keys."""

from __future__ import annotations

import random

import numpy as np

from workers.attention.plan import Selection


def random_selection(stop: int, rng: random.Random) -> Selection:
    """Near offsets, a few intervals far away, and columns of which some lie inside them."""
    offsets, low = [(0, min(rng.choice((0, 5, 70)), stop - 1))], 0
    while (low := offsets[-1][1] + rng.randint(2, 150)) < stop:
        offsets.append((low, min(low + rng.choice((0, 3, 64, 90)), stop - 1)))
    columns = sorted(rng.sample(range(stop), min(stop, rng.choice((1, 30, 200)))))
    return Selection(np.array(offsets, np.int32), np.array(columns, np.int32))
