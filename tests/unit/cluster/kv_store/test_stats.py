"""Counters add up, and the speed of loads follows from them."""

from cluster.kv_store.stats import KvStats


def test_counters_add_up() -> None:
    stats = KvStats()
    assert stats.load_rate == 0
    stats.add(loaded_blocks=2, loaded_bytes=100, load_s=0.5)
    stats.add(loaded_blocks=1, loaded_bytes=100, load_s=0.5)
    assert stats.load_rate == 200
    assert {name: value for name, value in stats.counters().items() if value} == {
        "loaded_blocks": 3, "loaded_bytes": 200, "load_s": 1.0,
    }  # fmt: skip
