"""Numbers of query-key pairs of a plan."""

from __future__ import annotations

from workers.attention.plan import AttentionPlan, TileKeys


def causal_pairs(plan: AttentionPlan) -> int:
    """Return the number of pairs of causal attention of the plan's rows."""
    return plan.length * (plan.start + 1) + plan.length * (plan.length - 1) // 2


def visited_pairs(plan: AttentionPlan, head: int) -> int:
    """Return the number of pairs that one head visits, without those that the causal mask removes."""
    if plan.heads is None:
        return causal_pairs(plan)
    return sum(_tile_pairs(tile, plan.start) for tile in plan.tile_keys(head))


def _tile_pairs(tile: TileKeys, start: int) -> int:
    first, rows = start + tile.start, tile.stop - tile.start

    def visible(stop: int) -> int:
        """Return the visible pairs of all keys before `stop`; key `first + i` is hidden from `i` rows."""
        late = max(stop - 1 - first, 0)
        return stop * rows - late * (late + 1) // 2

    hidden = int((tile.columns - first).clip(min=0).sum())  # of the columns
    return sum(visible(keys.stop) - visible(keys.start) for keys in tile.ranges) + len(tile.columns) * rows - hidden
