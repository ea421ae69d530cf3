"""The price file, a user's own prices, and the choice among rows."""

import datetime
import tomllib
from pathlib import Path

import pytest
from harness.places import REPOSITORY

from kervan.errors import ConfigError
from kervan.facts import prices
from kervan.facts.hardware import GPUS
from kervan.facts.prices import Price, parse_price_usd_per_h

TODAY = datetime.date(2026, 11, 25)


def price(usd: float, provider: str = "", day: int = 1, gpu: str = "H100") -> Price:
    return Price(gpu=gpu, market="on-demand", usd_per_gpu_h=usd, date=datetime.date(2026, 11, day), provider=provider)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    return path


def test_shipped_prices_say_where_and_when() -> None:
    shipped = prices.load()
    assert len(shipped) > 20
    for row in shipped:
        assert row.gpu in GPUS
        assert row.source.startswith("https://"), row
        assert row.provider and row.instance, row
        assert 0 <= row.age_days(TODAY) < 365, row
    assert len({(row.gpu, row.market, row.provider, row.instance) for row in shipped}) == len(shipped)


def test_the_price_file_is_part_of_the_package() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "facts/prices.yaml" in settings["tool"]["setuptools"]["package-data"]["kervan"]


@pytest.mark.parametrize(
    ("rows", "usd"),
    [
        pytest.param([price(3, "RunPod"), price(9, "AWS"), price(7, "Azure")], 7, id="the cheapest large cloud"),
        pytest.param([price(3, "RunPod"), price(2, "Vast")], 2, id="nobody large: the cheapest"),
        pytest.param([price(3, "", gpu="H200")], None, id="another GPU"),
        pytest.param([], None, id="no rows"),
    ],
)
def test_which_price_counts(rows: list[Price], usd: float | None) -> None:
    found = prices.lookup("h100 sxm", "on-demand", rows)
    assert (found and found.usd_per_gpu_h) == usd


def test_of_equal_prices_the_newest_counts() -> None:
    found = prices.lookup("H100", "on-demand", [price(3, "AWS", 1), price(3, "AWS", 9), price(3, "AWS", 4)])
    assert found is not None and found.date.day == 9


def test_markets_are_apart() -> None:
    on_demand, spot = prices.lookup("H200"), prices.lookup("H200", "spot")
    assert on_demand is not None and spot is not None
    assert spot.usd_per_gpu_h < on_demand.usd_per_gpu_h
    assert prices.lookup("GB200") is None


def test_a_users_file_replaces_the_rows_that_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "prices: [{gpu: nvidia h100, market: on-demand, usd_per_gpu_h: 2, date: 2026-11-20}]")
    known = prices.load(path)
    own = prices.lookup("H100", "on-demand", known)
    assert own == Price(gpu="H100", market="on-demand", usd_per_gpu_h=2, date=datetime.date(2026, 11, 20))
    assert [row for row in known if row.gpu == "H100" and row.market == "on-demand"] == [own]
    assert prices.lookup("H100", "spot", known) == prices.lookup("H100", "spot")
    assert prices.lookup("H200", "on-demand", known) == prices.lookup("H200")


@pytest.mark.parametrize(("age_days", "is_old"), [(0, False), (180, False), (181, True), (-1, False)])
def test_old_prices_warn(age_days: int, is_old: bool) -> None:
    row = Price(gpu="H100", market="spot", usd_per_gpu_h=2.5, date=TODAY - datetime.timedelta(age_days), provider="AWS")
    assert row.age_days(TODAY) == age_days
    assert bool(row.warning(TODAY)) == is_old
    if is_old:
        assert row.warning(TODAY) == (
            "the price of H100 (2.5 USD/h, AWS, spot, 2026-05-28) is 181 days old, more than 180; "
            "give today's with --price or --prices FILE"
        )


@pytest.mark.parametrize(
    "text", ["3.40/h", "3.40", "$3.40/h", "$3.40", " 3.4 / h ", "3.40/hour", "3.4/gpu-h", "3.4/GPU/h"]
)
def test_prices_are_read(text: str) -> None:
    assert parse_price_usd_per_h(text) == pytest.approx(3.4)


@pytest.mark.parametrize(
    "text", ["", "three", "3,40/h", "3.40/min", "3.40 EUR", "-3/h", "/h", "1e3", "nan", "$", "3..4"]
)
def test_no_prices_are_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not an amount of US dollars per GPU and hour; write for example --price 3\.40/h"
    ):
        parse_price_usd_per_h(text)


@pytest.mark.parametrize("text", ["0/h", "0.0", "10001"])
def test_prices_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not above 0 and at most 10000 USD/h"):
        parse_price_usd_per_h(text)


ROW = {"gpu": "H100", "market": "on-demand", "usd_per_gpu_h": "3.40", "date": "2026-11-20"}


def one_row(**changes: str | None) -> str:
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    return "prices:\n  - {" + ", ".join(f"{key}: {value}" for key, value in row.items()) + "}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("prices: [", "cannot be read: line 1, 'prices: \\[', is no valid YAML", id="yaml"),
        pytest.param("", "has no list 'prices:' alone", id="empty"),
        pytest.param("- 3", "has no list 'prices:' alone", id="a list"),
        pytest.param("prices: []", "has no list 'prices:' alone", id="no rows"),
        pytest.param("prices: [3.40]", "row 1: 3.4 is float; give gpu, market", id="no mapping"),
        pytest.param(one_row() + "rates: 1\n", "has no list 'prices:' alone", id="another key"),
        pytest.param(one_row(usd="3"), "row 1 has unknown key 'usd'", id="unknown key"),
        pytest.param(one_row(date=None), "row 1 has no date; give gpu", id="missing key"),
        pytest.param(one_row(gpu="H2000"), r"row 1: no GPU 'H2000' is known; did you mean H200\?", id="gpu"),
        pytest.param(one_row(market="reserved"), "market 'reserved' is not one of on-demand, spot", id="market"),
        pytest.param(one_row(usd_per_gpu_h="cheap"), "usd_per_gpu_h='cheap' is not a number", id="no number"),
        pytest.param(one_row(usd_per_gpu_h="true"), "usd_per_gpu_h=True is not a number", id="true"),
        pytest.param(one_row(usd_per_gpu_h=".nan"), r"usd_per_gpu_h=nan is outside 0\.\.10000", id="nan"),
        pytest.param(one_row(usd_per_gpu_h="0"), r"usd_per_gpu_h=0 is outside 0\.\.10000", id="zero"),
        pytest.param(one_row(usd_per_gpu_h="-1"), r"usd_per_gpu_h=-1 is outside 0\.\.10000", id="negative"),
        pytest.param(one_row(date="'today'"), "date 'today' is not a date; write", id="date"),
        pytest.param("[" * 100_000, "cannot be read: it is nested too deeply", id="too deep"),
        pytest.param(one_row(date="2026-11-31"), "cannot be read: day is out of range", id="no such day"),
        pytest.param(one_row(usd_per_gpu_h="9" * 400), r"is outside 0\.\.10000", id="huge"),
        pytest.param(one_row(date="2026-11-20T10:00:00"), r"date datetime\.datetime\(.*\) is not a date", id="a time"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prices.load(write(tmp_path, text))


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; check the path given to --prices"):
        prices.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        prices.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        prices.load(tmp_path / "binary")
