import pytest

from kervan.errors import ConfigError
from kervan.units import format_duration, parse_duration_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("1.5s", 1.5), ("2min", 120), ("3h", 10800), ("7", 7), (" 40 us ", 4e-5), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 day", "1e3s", "nan", "1.2.3s"])
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
