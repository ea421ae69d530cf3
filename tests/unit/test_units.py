import pytest

from kervan.errors import ConfigError
from kervan.units import (
    find_rate_per_s,
    format_duration,
    parse_count,
    parse_duration_s,
    parse_factor,
    parse_rate_per_s,
    parse_share,
    shortened,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("2min", 120),
        ("3h", 10800),
        ("7", 7),
        (" 40 us ", 4e-5),
        (".5s", 0.5),
        ("5 seconds", 5),
        ("2 minutes", 120),
        ("1hour", 3600),
        ("1e3s", 1000),
        ("1e-3s", 0.001),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 day", "1e400", "nan", "1.2.3s", "5S", "1min30s", "1_0s", "e3"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--timeout .*250ms"):
        parse_duration_s(text, "--timeout")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0234, "23.4 ms"), (1.234, "1.23 s"), (12.34, "12.3 s"), (123.4, "123 s"), (0.0009996, "1.00 ms"),
     (1.7e-5, "17.0 us"), (0.0, "0.00 us"), (0.9999, "1.00 s"), (0.5, "500 ms"), (3600, "3600 s")],
)  # fmt: skip
def test_format(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("5", 5), ("5/s", 5), (" 5 / s ", 5), ("2.5/sec", 2.5), ("300/min", 5), ("18000/h", 5), ("5 requests/s", 5),
        ("5req/s", 5), ("1 request/second", 1), ("5 rps", 5), ("1e3", 1000), (".5/s", 0.5),
    ],
)  # fmt: skip
def test_rates(text: str, rate: float) -> None:
    assert parse_rate_per_s(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    "text", ["", "0", "0/s", "-1", "nan", "inf", "1e6", "5/", "5/day", "5s", "5/ms", "s", "1,2", "5%"]
)
def test_no_rates(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--rate .*above 0 and below 1,000,000; write for example --rate 5/s"):
        parse_rate_per_s(text, "--rate")


def test_errors_show_the_beginning_and_the_end_of_a_long_text() -> None:
    assert shortened("x" * 40) == "x" * 40
    assert shortened("1" + "0" * 300 + "h") == "1" + "0" * 28 + "..." + "0" * 7 + "h"


def test_a_rate_of_0_is_one_where_a_ramp_begins() -> None:
    assert find_rate_per_s("0/s") == 0.0


def test_shares_factors_and_counts() -> None:
    assert [parse_share(text) for text in ("0", "0.6", "60%", "100 %", "1")] == pytest.approx([0, 0.6, 0.6, 1, 1])
    assert [parse_factor(text) for text in ("2", "2x", ".5 x")] == [2, 2, 0.5]
    assert [parse_count(text, "--streams", most=99) for text in ("1", " 64 ", "99")] == [1, 64, 99]
    for parse, texts in (
        (parse_share, ("", "1.1", "101%", "-1", "nan", "a half")),
        (parse_factor, ("", "0", "-1", "inf", "1e999", "twice")),
        (lambda text: parse_count(text, "--streams", most=99), ("", "0", "100", "1.5", "-1", "1_0", "\u0662")),
    ):
        for text in texts:
            with pytest.raises(ConfigError, match=r"write for example"):
                parse(text)
