"""Kervan's HTML pages: one file each, with nothing to load from elsewhere; their templates extend `page.html`."""

from collections.abc import Callable, Mapping
from typing import Any

from kervan.errors import ConfigError


def check(needed_by: str, extra: str) -> None:
    """Raises: ConfigError, naming the option or command and the extra with it, when jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"{needed_by} needs the package jinja2: pip install 'kervan[{extra}]'") from error


def plotly_source() -> str:
    """Plotly's JavaScript, for `plotly` of a page with figures. Raises: ConfigError when it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError(f"--html needs the package {error.name}: pip install 'kervan[bench]'") from error
    source: str = get_plotlyjs()
    return source


def render(room: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The page of `kervan/<room>/report.html`.

    `values`: `title` and `subtitle`, what the template asks for, and with plots `figures` (by the id of their place)
    and `plotly`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("kervan", room), jinja2.PackageLoader("kervan", "report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters or {})
    return environment.get_template("report.html").render(**values)
