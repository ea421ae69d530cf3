"""Which line of a YAML or TOML file is broken, without the parser's own words for it."""

import re

import yaml


def broken(error: Exception, text: str) -> str:
    """What is wrong with `text`, of which a parser has raised `error`: its line, if the error says which."""
    if isinstance(error, RecursionError):
        return "cannot be read: it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    place = re.search(r"\(at line (\d+), column \d+\)", str(error))  # tomllib's
    if mark is None and place is None:
        return f"cannot be read: {' '.join(str(error).split())}"
    lines = text.splitlines() or [""]
    number = min(len(lines), mark.line + 1 if mark is not None else int(place[1]) if place is not None else 1)
    kind = "YAML" if isinstance(error, yaml.YAMLError) else "TOML"
    return (
        f"cannot be read: line {number}, {lines[number - 1][:60]!r}, is no valid {kind}; look at indentation (no "
        "tabs), colons, quotes and brackets there and above"
    )
