"""Files as text: YAML with a line about where it comes from, in the order in which it was made."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kervan import __version__

WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """Without aliases, which few readers expect, and with text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def made_by(target: str, comment: str = "#") -> str:
    """The first line of a file."""
    return f"{comment} Made by kervan {__version__}: kervan cluster render --target {target}\n"


def as_yaml(target: str, *documents: Mapping[str, Any] | Sequence[Any]) -> str:
    """One file of these documents."""
    body = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=WIDTH, explicit_start=len(documents) > 1, allow_unicode=False
    )
    return made_by(target) + body


def plain_yaml(value: Mapping[str, Any]) -> str:
    """The same without the first line, for a file within a file."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=WIDTH)
