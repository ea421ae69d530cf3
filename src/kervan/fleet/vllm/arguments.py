"""Engine arguments, names and values, checked against the installed vLLM before anything starts.

vLLM's own parser would say the same, 15 to 20 s later: it has to be imported, by a replica. What only vLLM can judge
(what a config class validates, what a model allows) is left to it.
"""

import datetime
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from kervan.config.engine_arguments import HUMAN_NUMBER, with_plain_numbers
from kervan.errors import ConfigError
from kervan.fleet.vllm.argument_source import Argument, Field, Source
from kervan.vendor.vllm_names import JSON_LIST_ARGUMENTS

MAX_SHOWN_CHARS = 80
MAX_LISTED = 12  # names, where the nearest one can be told
MAX_DEPTH = 50  # of a value's lists and mappings
SECRET = frozenset({"hf_token"})
SIZE = re.compile(r"\d+(\.\d+)?[kmgt]|\d+[KMGT]")
NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # argparse's: no option, although it begins with a hyphen
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "size": "a whole number such as 4096, 4k (4,000) or 4K (4,096)",
    "length": "a whole number such as 4096, 4k (4,000) or 4K (4,096), or auto",
    "json": "a mapping",
    "config": "a mapping",
    "either": "a text or a mapping",
    "text": "a text",
    "any": "a text",
}
# (argument, what it needs beside it); source: `validate_parsed_serve_args`.
NEEDED = (("enable_auto_tool_choice", "tool_call_parser"), ("enable_log_outputs", "enable_log_requests"))
# Arguments that let vLLM learn names that its source does not have.
PLUGIN_ARGUMENTS = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}


def installed_vllm() -> Path:
    """The directory of the installed vLLM.

    Raises: ConfigError when there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError("vLLM is not installed here; install it: pip install 'kervan[gpu]' (or 'kervan[cpu]')")
    return Path(spec.origin).parent


def installed_version() -> str:
    """The version of the installed vLLM, without importing it. Raises: ConfigError without vLLM."""
    try:
        text = (installed_vllm() / "_version.py").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"^(?:__version__ = )?version = '([^']+)'", text, re.MULTILINE)
    return found[1] if found else "unknown"


@functools.cache
def _source(root: Path) -> Source:
    return Source(root)


def check(arguments: Mapping[str, Any]) -> None:
    """Raises: ConfigError naming the first argument that vLLM's parser does not know or would not take, and the fix."""
    source = _source(installed_vllm())
    names = source.names
    for name, value in arguments.items():
        if name not in names:
            raise ConfigError(f"vLLM has no engine argument {name!r}; {_nearest_name(name, source)}")
        if value is not None and (problem := _problem(source.argument(name), value)):
            shown = "..." if name in SECRET else _shown(value)
            raise ConfigError(f"engine argument {name}={shown} {problem}")
    _check_together(arguments)
    _check_registered(source, arguments)


def _nearest_name(name: str, source: Source) -> str:
    names = source.names
    if name in source.second_names:
        return f"write {source.second_names[name]}"
    option, dot, field = name.partition(".")
    if dot and option in names:
        return f'give its fields as a mapping: {option}={{"{field}": VALUE}}'
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else "see 'vllm serve --help=all' for the names"


def _check_together(arguments: Mapping[str, Any]) -> None:
    for name, needed in NEEDED:
        if arguments.get(name) is True and not arguments.get(needed):
            raise ConfigError(f"engine argument {name}=true needs {needed} too; give it, or leave {name} out")


def _check_registered(source: Source, arguments: Mapping[str, Any]) -> None:
    """Names of parsers, loaders and quantisations; not where a plugin may add some."""
    for name, value in arguments.items():
        if not isinstance(value, str) or arguments.get(PLUGIN_ARGUMENTS.get(name, "")) or value in ("", "None", "none"):
            continue
        known = source.registered(name)
        word = value.lower() if name == "attention_backend" else value
        if known and word not in known and not _has_plugins():
            raise ConfigError(f"engine argument {name}={_shown(value)} {_not_one_of(value, known)}")


def _has_plugins() -> bool:
    """Whether something beside vLLM itself may add names to it when it starts."""
    found = [
        *metadata.entry_points(group="vllm.general_plugins"),
        *metadata.entry_points(group="vllm.platform_plugins"),
    ]
    return any(not point.value.startswith("vllm.") for point in found)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value) if isinstance(value, list | Mapping) else repr(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return _shown_text(text)


def _shown_text(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def _problem(argument: Argument, value: Any) -> str | None:
    """What is wrong with a value that is not None, and the fix; None where nothing is."""
    if problem := _foreign(value):
        return problem
    if argument.action in ("flag", "switch"):
        return None if isinstance(value, bool) else _not_a_flag(argument.name, value)
    if isinstance(value, bool):
        if argument.nargs == "?" and value:
            return None
        return f"is not {_expected(argument)}; give one, or leave it out"
    if isinstance(value, list | tuple):
        return _problem_of_list(argument, value)
    if isinstance(value, Mapping):
        return _problem_of_mapping(argument, value)
    return _problem_of_text(argument, str(value))


def _foreign(value: Any, depth: int = MAX_DEPTH) -> str | None:
    """Of a value that YAML or TOML reads as something that JSON has no word for."""
    if isinstance(value, datetime.date | datetime.time):
        return "is a date or time; write it in quotes"
    if not depth:
        return f"is nested more than {MAX_DEPTH} deep; write it flatter"
    if isinstance(value, Mapping):
        inner: Iterable[Any] = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        inner = value
    else:
        is_plain = value is None or isinstance(value, str | int | float)
        return None if is_plain else f"is of the type {type(value).__name__}; give a text, number, list or mapping"
    return next((problem for item in inner if (problem := _foreign(item, depth - 1))), None)


def _not_a_flag(name: str, value: Any) -> str:
    text = str(value).lower()
    meant = "true" if text in ("true", "1", "yes", "on") else "false" if text in ("false", "0", "no", "off") else ""
    return f"is not true or false; write {name}={meant}" if meant else "is not true or false; give one of them"


def _expected(argument: Argument) -> str:
    if argument.name in JSON_LIST_ARGUMENTS:
        return "a list of texts"
    if argument.choices:
        return f"one of {', '.join(argument.choices)}"
    one = EXPECTED[argument.kind]
    return one if argument.nargs in (None, "?") and argument.action != "append" else f"a list, each item {one}"


def _problem_of_list(argument: Argument, items: Sequence[Any]) -> str | None:
    if argument.name in JSON_LIST_ARGUMENTS:
        return None if all(isinstance(item, str) for item in items) else "has an item that is no text; give texts only"
    if argument.nargs in (None, "?") and argument.action != "append":
        return f"is a list; give {_expected(argument)}"
    if not items and argument.action != "append":
        return "is an empty list; leave it out for vLLM's default"
    if isinstance(argument.nargs, int) and len(items) != argument.nargs:
        return f"has {len(items)} items; give {argument.nargs}"
    for item in items:
        if isinstance(item, bool) or item is None or isinstance(item, list | tuple):
            return f"has the item {_shown(item)}; give {_expected(argument)}"
        if isinstance(item, Mapping):
            if problem := _problem_of_mapping(argument, item):
                return f"has the item {_shown(item)}, which {problem}"
            continue
        text = str(item)
        if text.startswith("-") and argument.action != "append" and len(items) > 1 and not NUMBER.fullmatch(text):
            return f"has the item {_shown(item)}, which vLLM's parser would read as an option; give another name"
        if problem := _problem_of_text(argument, text):
            return problem if len(items) == 1 else f"has the item {_shown(item)}, which {problem}"
    return None


def _problem_of_mapping(argument: Argument, value: Mapping[str, Any]) -> str | None:
    if argument.name == "lora_modules":
        missing = [key for key in ("name", "path") if not value.get(key)]
        return f"lacks {' and '.join(missing)}; give both" if missing else None
    if argument.kind not in ("json", "either", "config") or argument.name in JSON_LIST_ARGUMENTS:
        return f"is a mapping; give {_expected(argument)}"
    for key, item in value.items() if argument.fields else ():
        if key not in argument.fields:
            near = difflib.get_close_matches(str(key), argument.fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(argument.fields))}"
            return f"has no field {key!r}; {hint}"
        if problem := _problem_of_field(argument.fields[key], item):
            return f"has the field {key}={_shown(item)}, which {problem}"
    return None


def _problem_of_field(field: Field, value: Any) -> str | None:
    """Only what pydantic surely refuses: it reads the text "2" as a number, and 1 as true."""
    if not field.names <= {"bool", "int", "float", "str", "None"} or (value is None and "None" in field.names):
        return None
    if field.choices:
        if "str" in field.names or not all(isinstance(choice, str) for choice in field.choices):
            return None
        return None if value in field.choices or field.names - {"None"} else _not_one_of(value, field.choices)
    if isinstance(value, list | tuple | Mapping):
        return f"is no single value; give {' or '.join(sorted(field.names - {'None'}))}"
    if isinstance(value, str) and field.names <= {"int", "float", "None"} and not _is_number(value):
        return "is no number; give one"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return bool(HUMAN_NUMBER.fullmatch(text))
    return True


def _problem_of_text(argument: Argument, text: str) -> str | None:
    if argument.is_optional and text in ("", "None"):
        return None
    if "\0" in text:
        return "has a null byte; leave it out"
    if argument.name == "lora_modules" and text:
        return _problem_of_adapter(argument, text)
    if argument.kind in ("config", "json") or (argument.kind == "either" and text.strip()[:1] == "{"):
        return _problem_of_json(argument, text)
    if not _is_readable(argument, text):
        return f"is not {EXPECTED[argument.kind]}; give one"
    if argument.choices:
        word = text.lower().replace("-", "_") if argument.is_folded else text
        word = str(int(word)) if argument.kind == "int" else word
        return None if word in argument.choices else _not_one_of(text, argument.choices)
    return None


def _problem_of_adapter(argument: Argument, text: str) -> str | None:
    if "=" in text and "," not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "is neither NAME=PATH nor a mapping of name and path; write for example sql=/adapters/sql"
    return _problem_of_mapping(argument, value) if isinstance(value, Mapping) else "is no mapping of name and path"


def _problem_of_json(argument: Argument, text: str) -> str | None:
    try:
        value = json.loads(with_plain_numbers(text) if argument.kind == "config" else text)
    except (ValueError, RecursionError):
        example = json.dumps([text]) if argument.name in JSON_LIST_ARGUMENTS else '{"key": VALUE}'
        return f"is not {_expected(argument)} in JSON; write for example {_shown_text(example)}"
    if isinstance(value, list):
        return _problem_of_list(argument, value)
    return (
        _problem_of_mapping(argument, value)
        if isinstance(value, Mapping)
        else f"is not {_expected(argument)}; give one"
    )


def _is_readable(argument: Argument, text: str) -> bool:
    """Whether it is a number where one is wanted."""
    try:
        match argument.kind:
            case "int":
                int(text)
            case "float":
                float(text)
            case "size" | "length":
                if argument.kind == "length" and text.strip().lower() in ("auto", "-1"):
                    return True
                return bool(SIZE.fullmatch(text.strip())) or int(text) is not None
    except ValueError:
        return False
    return True


def _not_one_of(value: Any, known: Sequence[Any]) -> str:
    names = [str(name) for name in dict.fromkeys(known)]
    near = [] if isinstance(known[0], int) else difflib.get_close_matches(str(value).lower(), names, n=1)
    listed = f"one of {', '.join(names)}" if len(names) <= MAX_LISTED else f"one of vLLM's {len(names)} values for it"
    if near:
        return f"is not {listed}; did you mean {near[0]}?"
    return f"is not one of {', '.join(names)}"
