"""Generated configurations; what loads them is in tests/unit/cluster/config/test_schema_fuzz.py."""

from cluster.bench.faults.yaml_files import generate


def test_a_seed_gives_the_same_files_and_others_give_others() -> None:
    files = [generate(1, number) for number in range(50)]
    assert files == [generate(1, number) for number in range(50)]
    assert len(set(files)) == 50
    assert not set(files) & {generate(2, number) for number in range(50)}
