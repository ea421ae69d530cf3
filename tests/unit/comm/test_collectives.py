"""Values, sizes and bandwidths of collectives, by hand; that they are measured rightly is in tests/contract."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.cli import option_types
from kervan.comm import bench, expected
from kervan.comm.bench import BenchSettings, Place
from kervan.comm.collectives import Dtype, Op, Timing, bus_factor, num_items
from kervan.errors import CapacityError, ConfigError
from kervan.ranks.rank import Nodes


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1024).filter(lambda ranks: ranks % expected.PERIOD))
def test_sums_over_any_number_of_ranks_are_exact_in_bfloat16(ranks: int) -> None:
    sums = expected.sums(ranks)
    assert max(sums) <= expected.MAX_SUM  # bfloat16 has all whole numbers up to 256, so also every partial sum
    assert min(expected.table(ranks)) >= 0
    assert len(set(sums)) > 1


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 200])
def test_a_result_in_a_wrong_place_or_of_a_wrong_rank_is_seen(ranks: int) -> None:
    row = [expected.value(i, 0, ranks) for i in range(expected.PERIOD)]
    for shift in (1, 2, 4, 8, 64, 256, 508):
        assert row != row[shift:] + row[:shift]
    assert row != [expected.value(i, 1, ranks) for i in range(expected.PERIOD)]


@pytest.mark.parametrize(
    ("op", "ranks", "factor"),
    [("all_reduce", 2, 1.0), ("all_reduce", 4, 1.5), ("all_gather", 4, 0.75), ("reduce_scatter", 8, 0.875),
     ("all_to_all", 2, 0.5), ("broadcast", 8, 1.0), ("send_recv", 8, 1.0), ("one_way", 2, 1.0), ("all_reduce", 1, 0.0)],
)  # fmt: skip
def test_bus_factors_are_those_of_nccl_tests(op: Op, ranks: int, factor: float) -> None:
    assert bus_factor(op, ranks) == factor


@pytest.mark.parametrize(
    ("op", "size", "ranks", "dtype", "items"),
    [("all_reduce", 8, 4, "bfloat16", 4), ("all_reduce", 1, 4, "float32", 1), ("all_gather", 8, 4, "float32", 4),
     ("all_to_all", 1000, 3, "bfloat16", 498), ("broadcast", 1 << 20, 2, "float16", 1 << 19)],
)  # fmt: skip
def test_a_size_is_that_of_the_larger_buffer_and_is_cut_evenly(
    op: Op, size: int, ranks: int, dtype: Dtype, items: int
) -> None:
    assert num_items(op, size, ranks, dtype) == items


def timing(**changes: object) -> Timing:
    row = Timing(
        op="all_reduce", ranks=4, bytes=268435456, mode="eager", backend="nccl", dtype="bfloat16", time_us=1199.42,
        min_us=1190.0, max_us=1300.0, rank_us=(1.0, 1.0, 1.0, 2.0), num_wrong=0, slowest_rank=3, slowest_host="h",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_bandwidths_of_a_measured_row_are_those_of_its_record() -> None:
    # benchmarks/records/collectives-h200-2026-11-22.jsonl: 1199.42 us, busbw 335.7
    assert timing().algbw_gb_s == pytest.approx(223.8, abs=0.05)
    assert timing().busbw_gb_s == pytest.approx(335.7, abs=0.05)


def test_the_json_has_the_keys_that_scripts_rely_on_and_tells_wrong_results() -> None:
    place = Place(True, 4, 1 << 37, "NVIDIA H200")
    rows = (timing(), timing(num_wrong=2))
    result = bench.BenchResult(place=place, nodes=Nodes(), rows=rows, beside={}, notes=())
    first, second = result.to_dict()["rows"]
    assert {"op", "bytes", "time_us", "algbw_gb_s", "busbw_gb_s", "correct"} <= set(first)
    assert (first["correct"], second["correct"], result.is_correct) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("8", (8,)), ("8..64", (8, 16, 32, 64)), ("1KiB..3KiB", (1024, 2048)), ("8,1MiB,8", (8, 1 << 20)), ("1K", (1024,)),
     ("1MB", (1_000_000,)), ("0.5MiB", (1 << 19,))],
)  # fmt: skip
def test_sizes_are_lists_and_ranges_that_double(text: str, sizes: tuple[int, ...]) -> None:
    assert option_types.SIZES.parse(text, "--bytes") == sizes


@pytest.mark.parametrize("text", ["", "0", "-8", "8..", "..8", "64..8", "8 cats", "1..9999999999999GiB", "nan", "1e9"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--bytes"):
        option_types.SIZES.parse(text, "--bytes")


@pytest.mark.parametrize(("text", "is_good"), [("10.0.0.1:29400", True), ("[::1]:1", True), ("host", False), (":1", False), ("h:0", False), ("h:99999", False)])  # fmt: skip
def test_a_rendezvous_is_a_host_and_a_port(text: str, is_good: bool) -> None:
    if is_good:
        assert option_types.RENDEZVOUS.parse(text, "--rendezvous") == text
    else:
        with pytest.raises(ConfigError, match="HOST:PORT"):
            option_types.RENDEZVOUS.parse(text, "--rendezvous")


CPU = Place(False, 2, 4 << 30, "CPU")


def test_sizes_that_do_not_fit_are_refused_with_the_largest_that_does() -> None:
    # 2.5 x 2 GiB = 5 GiB of 4 GiB; 4 / 2.5 = 1.6 GiB
    with pytest.raises(CapacityError, match=r"up to 2 GiB need 2.5 times .* its 4.0 GiB; give at most 1.6 GiB"):
        bench.check(BenchSettings(bytes=(8, 2 << 30)), CPU)


def test_more_ranks_than_make_sense_on_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks 65 is more than 64"):
        bench.place(BenchSettings(device="cpu", ranks=65))
