"""What several commands read in the same way."""

import pytest

from kervan.cli import options
from kervan.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("max_model_len=4096", ("max_model_len", "4096")),
        ("a=b=c", ("a", "b=c")),
        ("--dtype=half", ("dtype", "half")),
        (" a =", ("a", "")),
    ],
)
def test_assignments(text: str, pair: tuple[str, str]) -> None:
    assert options.parse_assignment(text, "--engine-arg") == pair


@pytest.mark.parametrize("text", ["foo", "=1", "", "  =1"])
def test_no_assignment_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"has no key=value form; write for example --engine-arg max_model_len=4096"):
        options.parse_assignment(text, "--engine-arg")
