"""Which line of a YAML or TOML file is broken, without the parser's own words for it; JSON, read as safely."""

import json
import re
from typing import Any

TOO_DEEP = "it is nested too deeply"


def json_value(content: str | bytes) -> Any:
    """What JSON of a user says. Raises: ValueError for what is none, and for what is nested too deeply to read."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error


def broken(error: Exception, text: str, is_secret: bool = False) -> str:
    """What is wrong with `text`, of which a parser has raised `error`: its line, if the error says which.

    `is_secret`: the line's number is told, and not what is on it.
    """
    if isinstance(error, RecursionError):
        return f"cannot be read: {TOO_DEEP}"
    import yaml

    mark = getattr(error, "problem_mark", None)
    place = re.search(r"\(at line (\d+), column \d+\)", str(error))  # tomllib's
    if mark is None and place is None:
        return f"cannot be read: {' '.join(str(error).split())}"
    lines = text.splitlines() or [""]
    number = min(len(lines), mark.line + 1 if mark is not None else int(place[1]) if place is not None else 1)
    kind = "YAML" if isinstance(error, yaml.YAMLError) else "TOML"
    line = f"line {number}" if is_secret else f"line {number}, {lines[number - 1][:60]!r},"
    return (
        f"cannot be read: {line} is no valid {kind}; look at indentation (no "
        "tabs), colons, quotes and brackets there and above"
    )
