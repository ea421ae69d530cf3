"""What a node's watcher watches, where, and how often. Defaults are the clouds' own recommendations."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from kervan.errors import ConfigError

Watched = Literal["auto", "aws", "gcp", "azure", "signal"]
PREFIX = "KERVAN_NOTICES_"
LINK_LOCAL = "http://169.254.169.254"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoticeSettings:
    """Read from the environment by `from_environment`: the field `aws_url` is KERVAN_NOTICES_AWS_URL.

    Periods and leads are seconds. A lead is the time from a notice without a deadline of its own to the node's end.

    Raises: ConfigError for a time below 0, what is no URL, and an unknown name in `watch`.
    """

    watch: tuple[Watched, ...] = ("auto",)
    """Clouds by name, "auto" for the one that the node finds itself on, "signal" for SIGTERM; empty for nothing."""
    aws_url: str = LINK_LOCAL
    """Root of the metadata server, as of the two below."""
    gcp_url: str = LINK_LOCAL
    azure_url: str = LINK_LOCAL
    azure_vm_name: str = ""
    """What Azure calls this node; empty to ask the metadata server."""
    state_file: str = ""
    """Path or URL of the node's account, in which `{node}` stands for its address; empty for none."""
    aws_period_s: float = 5.0
    gcp_period_s: float = 1.0
    azure_period_s: float = 1.0
    gcp_wait_s: float = 10.0
    """Of a long poll. Far below the lead: a proxy in between that does not tell of changes is asked again in time."""
    gcp_lead_s: float = 30.0
    sigterm_lead_s: float = 25.0
    detect_timeout_s: float = 2.0
    """How long clouds may take to answer "auto"."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name}={value} is not a time of 0 s or more; leave it out for the default")
            if field.name.endswith("_url") and not value.startswith(("http://", "https://")):
                raise ConfigError(f"{field.name}={value!r} is not a URL; write for example http://127.0.0.1:1338")
        for name in self.watch:
            if name not in get_args(Watched):
                raise ConfigError(f"watch names {name!r}, which is not one of {', '.join(get_args(Watched))}")


def from_environment(environ: Mapping[str, str]) -> NoticeSettings:
    """The settings that an environment gives: KERVAN_NOTICES_WATCH=auto,signal and so on.

    Raises: ConfigError for a variable with this prefix that is unknown or malformed.
    """
    hints = get_type_hints(NoticeSettings)
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in hints:
            variables = ", ".join(PREFIX + key.upper() for key in hints)
            raise ConfigError(f"{variable} is not a setting of notices; known ones: {variables}")
        if name == "watch":
            values[name] = tuple(word.strip() for word in text.split(",") if word.strip())
        elif hints[name] is float:
            try:
                values[name] = float(text)
            except ValueError as error:
                raise ConfigError(f"{variable}={text!r} is not a number of seconds; write for example 2.5") from error
        else:
            values[name] = text.rstrip("/") if name.endswith("_url") else text
    return NoticeSettings(**values)  # type: ignore[arg-type]  # __post_init__ checks the values
