"""Options that several commands share."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from kervan.cli import option_types
from kervan.config import api_keys as keys
from kervan.config.engine_arguments import parse_value
from kervan.config.fleet import SETTINGS
from kervan.errors import ConfigError
from kervan.vendor.vllm_names import REPEATED_ARGUMENTS

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def setting(*declarations: str, **attributes: Any) -> Callable[[FunctionT], FunctionT]:
    """An option for a setting of a fleet (`--tp` for `tp`), whose help, type and default are those of its field.

    The command is given None for an option that the user leaves out, so that a file or a running fleet can decide.
    `attributes` are click's and win.
    """
    flag, _, opposite = declarations[0].partition("/")
    field = SETTINGS[declarations[-1] if len(declarations) > 1 else flag.removeprefix("--").replace("-", "_")]
    default = opposite.removeprefix("--") if opposite else str(field.default or "")
    attributes = {
        "type": click.Choice(get_args(field.type)) if get_origin(field.type) is Literal else field.type,
        "default": None,
        "help": f"{field.description}." + (f" [default: {default}]" if default else ""),
        **attributes,
    }
    return click.option(*declarations, **attributes)


DEFAULT_NAME = SETTINGS["name"].default
name = click.option(
    "--name", type=option_types.FLEET_NAME, default=DEFAULT_NAME, show_default=True, help="The fleet's name."
)
address = click.option(
    "--address", type=option_types.ADDRESS, help="Ray cluster to join (HOST:PORT); without it, Ray on this machine."
)
pools = click.option(
    "--pool",
    "pools",
    multiple=True,
    metavar="NAME:COUNT",
    help="Replicas by market type: on-demand:2, spot:0..6; repeatable.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Count(click.ParamType):  # type: ignore[type-arg]
    """A number, or two joined by `..`; the value is (number, 0) or (least, most)."""

    name = "N or MIN..MAX"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Both numbers; click ends the command, with an example, for what is no count."""
        least, dots, most = str(value).partition("..")
        try:
            counts = int(least), int(most) if dots else 0
        except ValueError:
            self.fail(f"{value!r} is neither a number nor a range; write for example 2 or 1..4", param, ctx)
        if counts[0] < 0:
            self.fail(f"{value!r} is below 0; write for example 2 or 1..4", param, ctx)
        if dots and counts[1] < max(1, counts[0]):
            self.fail(f"{value!r} goes from {counts[0]} down to {counts[1]}; write for example 1..4", param, ctx)
        return counts


EXAMPLES = {
    "--engine-arg": "max_model_len=4096",
    "--env": "HF_HUB_OFFLINE=1",
    "--twin": "speed=2",
    "--autoscaling": "target_ongoing_requests=16",
    "--label": "release=prometheus",
}


def parse_assignment(text: str, option: str) -> tuple[str, str]:
    """`key=value` as a pair.

    Raises: ConfigError without a "=" or with an empty key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r} has no key=value form; write for example {option} {EXAMPLES[option]}")
    return key.strip().removeprefix("--"), value


def engine_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """vLLM's arguments by their names with underscores, from `--engine-arg` options.

    Raises: ConfigError for a text that is no `key=value`, for broken JSON, and for a name that is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, value = parse_assignment(text, "--engine-arg")
        name = key.replace("-", "_")
        if name in found and name not in REPEATED_ARGUMENTS:
            raise ConfigError(f"--engine-arg gives {name} twice, {found[name]!r} and {value!r}; give it once")
        found[name] = [*_listed(found[name]), *_listed(parse_value(value))] if name in found else parse_value(value)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def pool_settings(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """The settings that `--pool` stands for; what each says is for the fleet's settings to check."""
    pools: dict[str, str] = {}
    for text in given:
        name, colon, count = text.partition(":")
        if not colon or not name or not count:
            raise ConfigError(f"--pool {text!r} has no NAME:COUNT form; write for example --pool spot:0..6")
        if name in pools:
            raise ConfigError(f"--pool {name} is given twice, with {pools[name]} and {count}; give it once")
        pools[name] = count
    return {"pools": pools} if pools else {}


def replica_settings(count: tuple[int, int] | None) -> dict[str, int]:
    """The settings that `--replicas` stands for: a plain number is the least and the most."""
    return {} if count is None else {"replicas": count[0], "max_replicas": count[1]}


def gateway_settings(count: tuple[int, int] | None) -> dict[str, int]:
    """The settings that `--gateways` stands for."""
    return {} if count is None else {"gateways": count[0], "max_gateways": count[1]}


KEY_VARIABLE = "KERVAN_API_KEY"


def api_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys of `--api-key`, as settings keep them, or without it those of KERVAN_API_KEYS and KERVAN_API_KEY.

    None if none of them is there. A variable that is set and empty counts as given: whoever sets it wants a key.

    Raises: ConfigError for one that no client can send.
    """
    if given:
        keys.check_keys(given, "--api-key")
        return keys.hashed(given)
    return keys.stored(_keys_of_environment())


def _keys_of_environment() -> dict[str, str]:
    named: dict[str, str] = {}
    if keys.VARIABLE in os.environ:
        named = keys.named_keys(os.environ[keys.VARIABLE])
    if KEY_VARIABLE in os.environ:
        keys.check_keys([os.environ[KEY_VARIABLE]], KEY_VARIABLE)
        if os.environ[KEY_VARIABLE] not in named.values():
            named["default" if "default" not in named else "default-2"] = os.environ[KEY_VARIABLE]
    return named


def client_key(given: str | None) -> str | None:
    """The key that a client sends: that given, else KERVAN_API_KEY, else the first of KERVAN_API_KEYS.

    Raises: as `api_keys`.
    """
    if given is not None:
        keys.check_keys([given], "--api-key")
        return given
    named = _keys_of_environment()
    return os.environ.get(KEY_VARIABLE) or next(iter(named.values()), None)


def sectioned(sections: Mapping[str, str]) -> type[click.Command]:
    """A command whose help has its options in sections: title -> options, with spaces between."""

    class Sectioned(click.Command):
        def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            by_name = {parameter.opts[-1]: parameter for parameter in self.get_params(ctx)}
            for title, names in sections.items():
                rows = [by_name[name].get_help_record(ctx) for name in names.split()]
                with formatter.section(title):
                    formatter.write_dl([row for row in rows if row is not None])

    return Sectioned
