"""Writes docs/reference from the code: the command line, settings, errors, JSON outputs, and the Python API.

python website/reference.py            # after a change of any of them; tests compare the pages with it
"""

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from kervan import errors
from kervan.cli import COMMANDS, cli
from kervan.config.fleet import SETTINGS

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_SIGNATURE = 110
PLACE = REPOSITORY / "docs/reference"
MADE = "<!-- Made by website/reference.py. -->"
SMALL = "benchmarks/models/llama3-8b"
# Commands that need neither a GPU nor a fleet, whose JSON is described by what they print.
FLEET_COMMANDS = Path(__file__).with_name("fleet_commands.json")  # made by fleet_commands.py
JSON_COMMANDS = {
    "kervan plan": ["plan", SMALL, "--gpu", "H200", "--gpus", "1"],
    "kervan simulate": ["simulate", SMALL, "--gpu", "H200", "--rate", "1/s", "--duration", "1min"],
    "kervan cluster cost": ["cluster", "cost", "--gpu", "H200", "--days", "1"],
    "kervan memory estimate": ["memory", "estimate", SMALL],
}


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PLACE / name).write_text(text)


def pages() -> dict[str, str]:
    """Text by the file's name."""
    made = {
        "cli.md": command_line(),
        "settings.md": settings(),
        "errors.md": error_page(),
        "json.md": json_page(),
        "python.md": python_page(),
    }
    return {name: f"{text.rstrip()}\n" for name, text in made.items()}


def cell(text: str) -> str:
    """For a table: one line, no column ends, nothing that is taken for markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# ---- the command line


def command_line() -> str:
    lines = [
        *("# Command line", "", MADE, ""),
        "What `--help` of each command prints. Exit statuses: [errors](errors.md). How rates, durations",
        "and lengths are written: [bench](../bench.md#how-values-are-written).",
        "",
    ]
    top = click.Context(cli, info_name="kervan")
    for name in COMMANDS:
        command = cli.get_command(top, name)
        assert command is not None
        lines += list(described(command, click.Context(command, info_name=name, parent=top)))
    return "\n".join(lines)


def described(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## {context.command_path}"
    yield ""
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{context.command_path} {usage}", "```", "")
    for paragraph in inspect.cleandoc(command.help or "").replace("\b", "").split("\n\n"):
        yield from (cell(paragraph), "")
    options = [record for p in command.get_params(context) if (record := p.get_help_record(context)) is not None]
    options = [(names, text) for names, text in options if text and names != "-h, --help"]
    if options:
        yield from ("| option | meaning |", "|---|---|")
        yield from (f"| `{names.replace('|', chr(92) + '|')}` | {cell(text)} |" for names, text in options)
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            if not inner.hidden:
                yield from described(inner, click.Context(inner, info_name=name, parent=context))


# ---- settings


def settings() -> str:
    lines = [
        *("# Settings", "", MADE, ""),
        "Keys of a fleet's file, `kervan up --config FILE`, in YAML or TOML. Options override them. How they are used:",
        "[serving](../serving.md#config-keys).",
        "",
        *("| key | type | default | meaning |", "|---|---|---|---|"),
    ]
    for setting in SETTINGS.values():
        default = "" if setting.default is dataclasses.MISSING else json.dumps(setting.default, default=list)
        lines.append(f"| `{setting.name}` | {values_of(setting.type)} | `{default}` | {cell(setting.description)} |")
    return "\n".join(lines).replace("| `` |", "| |")


def values_of(kind: Any) -> str:
    """What a setting takes, in words."""
    words = {bool: "true or false", int: "integer", float: "number, or a duration", str: "text"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind) if value)
    return {tuple: "list"}.get(get_origin(kind) or tuple, "mapping")


# ---- errors


def error_page() -> str:
    lines = [
        *("# Errors", "", MADE, ""),
        "Every error is one line: the value, the rule that it breaks, and the nearest fix. `kervan --debug up`,",
        "or of another command, shows where it comes from. In Python they are classes of `kervan.errors`:",
        "",
        *("| class | base | exit status | meaning |", "|---|---|---|---|"),
    ]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            status = 2 if issubclass(kind, errors.ConfigError) else 1
            base = kind.__base__.__name__ if kind.__base__ else ""
            lines.append(f"| `{name}` | `{base}` | {status} | {cell((kind.__doc__ or '').splitlines()[0])} |")
    lines += [
        "",
        "| exit status | when |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | what was asked for makes sense, and failed |",
        "| 2 | what was asked for is wrong: an option, a value, a file that is not there |",
        "| 130 | Ctrl-C before it was done |",
        "",
        "Statuses of HTTP answers: [serving](../serving.md#errors).",
    ]
    return "\n".join(lines)


# ---- JSON


def json_page() -> str:
    lines = [
        *("# JSON", "", MADE, ""),
        "With `--json`, commands print JSON on stdout. Errors stay one line on stderr, and the",
        "[exit status](errors.md) says how it went. Before version 1.0 fields may change; the",
        "[release notes](../../CHANGELOG.md) say so.",
        "",
        "The fields of commands that need no fleet, as they print them here; `[]` is each of a list, `*` each of a",
        "mapping, and `null` is possible wherever a figure is not known:",
        "",
    ]
    for title, words in JSON_COMMANDS.items():
        done = subprocess.run(
            [sys.executable, "-m", "kervan", *words, "--json"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        fields: dict[str, str] = {}
        collect("", json.loads(done.stdout), fields)
        lines += [f"## {title}", "", "```bash", f"kervan {' '.join(words)} --json", "```", ""]
        lines += field_table(fields)
    lines += ["Those of a running fleet, here one of simulated replicas:", ""]
    for title, told in json.loads(FLEET_COMMANDS.read_text()).items():
        lines += [f"## {title}", "", "```text", told["command"], "```", "", *field_table(told["fields"])]
    return "\n".join(lines)


def field_table(fields: dict[str, str]) -> list[str]:
    return ["| field | type |", "|---|---|", *(f"| `{name}` | {kind} |" for name, kind in fields.items()), ""]


def collect(name: str, value: Any, fields: dict[str, str]) -> None:
    """Fields of a JSON value by their path. Keys that are no words (policies, markets, sizes) are one `*`."""
    if isinstance(value, dict):
        is_open = any(not key.isidentifier() for key in value)
        for key, inner in value.items():
            step = "*" if is_open else key
            collect(f"{name}.{step}" if name else step, inner, fields)
    elif isinstance(value, list):
        for inner in value:
            collect(f"{name}[]", inner, fields)
        if not value:
            fields.setdefault(f"{name}[]", "list")
    else:
        kind = {"str": "string", "bool": "boolean", "int": "number", "float": "number", "NoneType": "null"}
        found = kind[type(value).__name__]
        before = fields.get(name)
        if before is None or before == "null":
            fields[name] = found if before is None or found == "null" else f"{found} or null"
        elif found == "null" and "null" not in before:
            fields[name] = f"{before} or null"


# ---- Python


def python_page() -> str:
    lines = [
        *("# Python", "", MADE, ""),
        "`import kervan` loads neither Ray nor vLLM. What is public is below; everything else may change.",
        "",
        "```python",
        "import kervan",
        "",
        "print(kervan.__version__)",
        "```",
        "",
        "How a fleet is called without HTTP: [serving](../serving.md#from-python), and in a",
        "[batch job](../../examples/batch.py).",
        "",
    ]
    handle = importlib.import_module("kervan.serve.handle")
    local = importlib.import_module("kervan.gateway.local")
    lines += list(function(handle.get_fleet, "kervan.get_fleet"))
    for kind in (handle.FleetHandle, local.CompletionRequest, local.Completion, local.TextChunk):
        lines += [f"## {kind.__name__}", "", docstring(kind), ""]
        if dataclasses.is_dataclass(kind):
            lines += ["| field | type |", "|---|---|"]
            lines += [f"| `{field.name}` | `{cell(kind_of(field.type))}` |" for field in dataclasses.fields(kind)] + [
                ""
            ]
        else:
            for name, member in vars(kind).items():
                if inspect.isfunction(member) and not name.startswith("_"):
                    lines += list(function(member, f"{kind.__name__}.{name}", level=3))
    return "\n".join(lines)


def kind_of(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def function(found: Any, name: str, *, level: int = 2) -> Iterator[str]:
    prefix = "async def " if inspect.iscoroutinefunction(found) else "def "
    signature = inspect.signature(found)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    shown = str(signature.replace(parameters=parameters)).replace("'", '"')
    for module in ("collections.abc.", "typing.", "kervan.serve.handle.", "kervan.gateway.local."):
        shown = shown.replace(module, "")
    if len(shown) > LONGEST_SIGNATURE:  # of vLLM's app, which says nothing here
        shown = shown.partition(" ->")[0]
    yield from (f"{'#' * level} {name}", "", "```python", f"{prefix}{name.rsplit('.', 1)[-1]}{shown}: ...", "```", "")
    yield from (docstring(found), "")


def docstring(found: Any) -> str:
    return textwrap.dedent(inspect.getdoc(found) or "").replace("<", "&lt;")


if __name__ == "__main__":
    main()
