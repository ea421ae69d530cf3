"""`kervan keys`: the file of a fleet's API keys."""

import contextlib
import datetime
import time
from pathlib import Path
from typing import Any

import click

from kervan.cli import options
from kervan.config.api_keys import KeyEntry, check_entry, check_keys, check_name, digest, new_key
from kervan.errors import ConfigError, FleetError
from kervan.units import parse_duration_s

DAY_S = 86_400
KEY_INPUT = "KERVAN_NEW_KEY"


class Expiry(click.ParamType):  # type: ignore[type-arg]
    """How long a key holds, in seconds; `never` is 0."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Seconds; click ends the command for what is no time."""
        text = str(value).strip()
        if text == "never":
            return 0
        with contextlib.suppress(ValueError):
            float(text)
            self.fail(f"{text!r} has no unit; write for example {text}d for days, 12h or never", param, ctx)
        number, days = text.removesuffix("d"), text.endswith("d")
        try:
            seconds = float(number) * DAY_S if days else parse_duration_s(text)
        except (ValueError, ConfigError):
            seconds = -1.0
        if not 1 <= seconds <= 100 * 365 * DAY_S:
            self.fail(f"{text!r} is no time from 1 s to 100 years; write for example 30d, 12h or never", param, ctx)
        return int(seconds)


class Models(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between; `all` is none."""

    name = "names"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The names; click ends the command where one is empty."""
        if isinstance(value, tuple):
            return value
        if value == "all":
            return ()
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} has an empty name; write for example a,b, or all", param, ctx)
        return tuple(dict.fromkeys(names))


def _limits(function: Any) -> Any:
    """The options that both `add` and `limit` have; None for those that are left out."""
    count = click.IntRange(0)
    for option in reversed(
        (
            click.option(
                "--requests-per-minute",
                type=count,
                metavar="N",
                help="Requests in a minute, evenly or at once. 0: no limit.",
            ),
            click.option(
                "--tokens-per-minute", type=count, metavar="N", help="Prompt and generated tokens in a minute."
            ),
            click.option("--streams", type=count, metavar="N", help="Streams at once."),
            click.option("--models", type=Models(), metavar="a,b", help="Models and adapters that it may use, or all."),
            click.option("--expires", type=Expiry(), metavar="30d", help="From now, like 30d or 12h, or never."),
        )
    ):
        function = option(function)
    return function


_file = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="KERVAN_API_KEYS_FILE",
    help="The file of keys. [default: $KERVAN_API_KEYS_FILE, or keys.yaml in ~/.kervan]",
)


@click.group()
def keys() -> None:
    """Add, list, limit and revoke API keys.

    They are in a file, as digests. `kervan up MODEL --api-keys FILE` lets its keys in, and follows it: changes hold at
    all gateways within seconds.
    """


@keys.command()
@click.argument("name")
@_limits
@_file
@options.as_json
def add(name: str, path: Path | None, as_json: bool, **limits: Any) -> None:
    """Make a key called NAME and print it, this once.

    A key that is there already, made elsewhere, is taken from the environment variable KERVAN_NEW_KEY.
    """
    import os

    path = _path(path)
    check_name(name, "NAME")
    given = os.environ.get(KEY_INPUT)
    if given is not None:
        check_keys([given], KEY_INPUT)
    key = given or new_key()
    entry = _limited(KeyEntry(name=name, digest=digest(key), created_s=int(time.time())), limits)
    check_entry(entry, "NAME")
    from kervan.config import key_file

    with key_file.changing(path, begins=True) as entries:
        if any(other.name == name for other in entries):
            raise ConfigError(
                f"{path} has a key {name} already; kervan keys limit {name} changes its limits, and kervan keys revoke "
                f"{name} ends it"
            )
        if any(other.digest == entry.digest for other in entries):
            raise ConfigError(f"{path} has the key of {KEY_INPUT} already, under another name; give another key")
        entries.append(entry)
    try:
        if as_json:
            from kervan.cli import render

            render.print_json({"name": name, "key": None if given else key, "file": str(path)})
        elif given is None:
            print(key)
        print(end="", flush=True)
    except OSError as error:
        if given is None:
            with key_file.changing(path) as entries:
                entries[:] = [other for other in entries if other.digest != entry.digest]
            raise FleetError(
                f"stdout cannot be written ({error.strerror or error}), and nobody has seen the new key; {path} has "
                f"no key {name}; write it elsewhere"
            ) from error
        raise
    if as_json:
        return
    click.echo(f"key {name} is in {path}" + ("" if given else "; it is not shown again"), err=True)


@keys.command("list")
@_file
@options.as_json
def list_keys(path: Path | None, as_json: bool) -> None:
    """Show the keys of the file and their limits."""
    from kervan.cli import render
    from kervan.config import key_file

    path = _path(path)
    entries = key_file.read(path)
    if problem := key_file.warning(path):
        click.echo(f"warning: {problem}", err=True)
    if as_json:
        render.print_json({"keys": [_told(entry) for entry in entries]})
        return
    from rich.markup import escape
    from rich.table import Table

    columns = ("requests/min", "tokens/min", "streams")
    table = Table("name", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right")
    for column in ("models", "created", "expires"):
        table.add_column(column)
    for entry in entries:
        limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.streams)
        is_over = 0 < entry.expires_s <= time.time()
        table.add_row(
            entry.name, *(f"{limit:,}" if limit else "-" for limit in limits), escape(",".join(entry.models)) or "all",
            _date(entry.created_s), "[red]expired[/red]" if is_over else _date(entry.expires_s) or "never",
        )  # fmt: skip
    render.open_console().print(table)


@keys.command()
@click.argument("name")
@_limits
@_file
def limit(name: str, path: Path | None, **limits: Any) -> None:
    """Change the limits of key NAME; those that are left out stay."""
    path = _path(path)
    if all(value is None for value in limits.values()):
        raise click.UsageError("give a limit to change, such as --requests-per-minute 60; 0 takes one away")
    from kervan.config import key_file

    with key_file.changing(path) as entries:
        place = _find(entries, name, path)
        entries[place] = _limited(entries[place], limits)
        check_entry(entries[place], "NAME")
    click.echo(f"key {name} is changed in {path}", err=True)


@keys.command()
@click.argument("name")
@_file
def revoke(name: str, path: Path | None) -> None:
    """End key NAME: new requests with it are refused within seconds; those in flight end as they would."""
    path = _path(path)
    from kervan.config import key_file

    with key_file.changing(path) as entries:
        del entries[_find(entries, name, path)]
    click.echo(f"key {name} is no longer in {path}", err=True)


def _find(entries: list[KeyEntry], name: str, path: Path) -> int:
    for place, entry in enumerate(entries):
        if entry.name == name:
            return place
    import difflib

    near = difflib.get_close_matches(name, [entry.name for entry in entries], n=1)
    hint = f"did you mean {near[0]}?" if near else f"kervan keys list --file {path} shows those that it has"
    raise ConfigError(f"{path} has no key {name[:63]!r}; {hint}")


def _limited(entry: KeyEntry, limits: dict[str, Any]) -> KeyEntry:
    import msgspec

    given = {name: value for name, value in limits.items() if value is not None}
    if (expires := given.pop("expires", None)) is not None:
        given["expires_s"] = int(time.time()) + expires if expires else 0
    return msgspec.structs.replace(entry, **given)


def _told(entry: KeyEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "requests_per_minute": entry.requests_per_minute,
        "tokens_per_minute": entry.tokens_per_minute,
        "streams": entry.streams,
        "models": list(entry.models),
        "created_s": entry.created_s,
        "expires_s": entry.expires_s,
    }


def _date(unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") if unix_s else ""


def _path(given: Path | None) -> Path:
    if given is not None:
        return given
    from kervan.serve import cluster

    return cluster.home() / "keys.yaml"
