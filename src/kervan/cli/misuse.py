"""What the command line says of arguments that it does not understand: one line, like all errors of kervan."""

import difflib
import sys
from collections.abc import Iterable

import click


def described(error: click.UsageError, commands: Iterable[str]) -> str:
    """What is wrong, what was probably meant, and whose help has more.

    `commands`: names of kervan's commands; click does not always tell in which of them it was.
    """
    if error.ctx is not None:
        path = error.ctx.command_path
    else:
        path = " ".join(["kervan", *[word for word in sys.argv[1:] if word in commands][:1]])
    return f"{_what(error, path, commands)}; see {path} --help"


def _what(error: click.UsageError, path: str, commands: Iterable[str]) -> str:
    if isinstance(error, click.NoSuchOption):
        return _no_option(error, path)
    if isinstance(error, click.MissingParameter):  # click lists choices on lines of their own
        kind = error.param.type if error.param is not None else None
        choices = f": one of {', '.join(map(str, kind.choices))}" if isinstance(kind, click.Choice) else ""
        what = "option" if isinstance(error.param, click.Option) else error.param_type or "argument"
        return f"{what} {_name(error)} is missing{choices}"
    message = " ".join(error.message.split()).removesuffix(".")
    if isinstance(error, click.BadParameter):
        return f"{_name(error)} {_in_words(message, error)}"
    no_command, quote, name = message.partition("No such command ")
    if quote and not no_command:
        return f"no command {name}{_did_you_mean(name.strip(chr(39)), commands)}"
    return message[:1].lower() + message[1:]


def _name(error: click.BadParameter) -> str:
    """Of the option or argument, as it is written on the command line."""
    if error.param is None:
        return str(error.param_hint or "argument").strip("'")
    if isinstance(error.param, click.Option):
        return max(error.param.opts, key=len)
    return error.param.human_readable_name.upper()


def _in_words(message: str, error: click.BadParameter) -> str:
    """What click says of a value; a number's range in words, which click gives as `1<=x<=8`."""
    kind = error.param.type if error.param is not None else None
    if isinstance(kind, click.Path):  # click begins with what it is: File 'x' does not exist
        return message[message.find("'") :]
    value, is_not, _ = message.partition(" is not ")
    if not isinstance(kind, (click.IntRange, click.FloatRange)) or not is_not:
        return message
    number = "a whole number" if isinstance(kind, click.IntRange) else "a number"
    words = f"of at least {kind.min:,}" if kind.max is None else f"from {kind.min or 0:,} to {kind.max:,}"
    return f"{value} is not {number} {words}"


def _no_option(error: click.NoSuchOption, path: str) -> str:
    options = [
        name
        for parameter in (error.ctx.command.params if error.ctx is not None else [])
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]
    meant = _did_you_mean(error.option_name, options)
    if not meant and "--engine-arg" in options and error.option_name.startswith("--"):
        argument = error.option_name.removeprefix("--").replace("-", "_")
        meant = f" (if it is vLLM's: --engine-arg {argument}=VALUE)"
    return f"{path} has no option {error.option_name}{meant}"


def _did_you_mean(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
