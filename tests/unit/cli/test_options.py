"""What several commands read in the same way."""

import click
import pytest

from kervan.cli import options
from kervan.config.fleet import SETTINGS
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


def shown(decorate: object) -> click.Option:
    command = click.command()(decorate(lambda **_: None))  # type: ignore[operator]
    return next(parameter for parameter in command.params if isinstance(parameter, click.Option))


def test_an_option_shows_what_its_setting_says() -> None:
    port = shown(options.setting("--port"))
    assert port.help == f"{SETTINGS['port'].description}. [default: 8000]"
    assert port.default is None  # a file or a running fleet may say otherwise
    assert port.type is click.INT
    assert shown(options.setting("--gpu")).help == f"{SETTINGS['gpu'].description}."  # without a default
    own = shown(options.setting("--shared-port/--own-port", "shared_port"))
    assert (own.name, own.is_flag, own.default) == ("shared_port", True, None)
    assert own.help is not None
    assert own.help.endswith("[default: own-port]")


def test_the_values_of_an_option_are_those_of_its_setting() -> None:
    engine = shown(options.setting("--engine")).type
    assert isinstance(engine, click.Choice)
    assert list(engine.choices) == ["vllm", "twin"]
