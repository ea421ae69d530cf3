"""Cloud machines: their GPUs are in the table, their names are found."""

import pytest

from kervan.errors import ConfigError
from kervan.facts import instances
from kervan.facts.hardware import GPUS
from kervan.facts.prices import LARGE_PROVIDERS, load


@pytest.mark.parametrize("row", instances.INSTANCES.values(), ids=instances.INSTANCES)
def test_rows_fit_the_table_of_gpus(row: instances.Instance) -> None:
    assert row.gpu in GPUS
    assert row.provider in LARGE_PROVIDERS
    assert row.source.startswith("https://")
    assert 1 <= row.num_gpus <= GPUS[row.gpu].link.max_gpus
    # The network between machines is slower than what joins the GPUs in one.
    assert row.network_bytes_s / row.num_gpus < GPUS[row.gpu].link.bytes_s


def test_bytes_follow_from_bits() -> None:
    assert instances.instance("P5.48xlarge").network_bytes_s == 400e9  # 3200 Gbit/s


def test_machines_of_a_gpu() -> None:
    assert [row.name for row in instances.with_gpu("nvidia h100")] == [
        "p5.48xlarge",
        "Standard_ND96isr_H100_v5",
        "a3-highgpu-8g",
    ]
    assert instances.with_gpu("RTX4090") == ()


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no instance 'p5\.48xlage' is known; did you mean p5\.48xlarge\? known: g5"):
        instances.instance("p5.48xlage")
    with pytest.raises(ConfigError, match="no instance '' is known; known: "):
        instances.instance("")


def test_prices_and_machines_of_one_name_have_the_same_gpu() -> None:
    both = [(row, instances.INSTANCES[row.instance]) for row in load() if row.instance in instances.INSTANCES]
    assert len(both) >= 5
    for row, machine in both:
        assert (row.gpu, row.provider) == (machine.gpu, machine.provider)
