"""`kervan observe plot`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from kervan.cli import option_types, options, outputs
from kervan.errors import ConfigError

MIN_S = 10.0


@click.command()
@click.argument("directory", metavar="[DIR]", required=False, type=option_types.FILE)
@click.option("--prometheus", "url", help="A running Prometheus, like http://127.0.0.1:9090; else give DIR.")
@click.option("--out", type=option_types.FILE, required=True, help="The picture: FILE.svg or FILE.html.")
@click.option("--dashboard", "board", default="fleet", show_default=True, help="fleet, replica, gateway or gpu.")
@click.option("--fleet", default="", help="Only this fleet.")
@click.option(
    "--for", "duration_s", type=option_types.DURATION, default="30min", show_default=True, help="How much, to the end."
)  # fmt: skip
@options.as_json
def plot(
    directory: Path | None, url: str | None, out: Path, board: str, fleet: str, duration_s: float, as_json: bool
) -> None:
    """Draw a dashboard, from a Prometheus or from its data in DIR, with the queries that Grafana gets.

    Of data in DIR, the last that was scraped is the end.
    """
    from kervan.cli import render as rendering
    from kervan.observe.render import plot as plotting
    from kervan.observe.render.prometheus import Prometheus, over_directory
    from kervan.observe.render.svg import as_html

    if (directory is None) == (url is None):
        raise click.UsageError("give either DIR or --prometheus URL")
    if duration_s < MIN_S:
        raise ConfigError(f"--for {duration_s:g} s is below {MIN_S:g} s; write for example --for 5min")
    if out.suffix not in (".svg", ".html"):
        raise ConfigError(f"--out {out} ends with neither .svg nor .html; write for example --out fleet.svg")
    outputs.check_file("--out", out)
    chosen = plotting.dashboard(board)

    def drawn(server: Prometheus, end_s: float) -> plotting.Drawing:
        return plotting.draw(
            chosen, server, begin_s=end_s - duration_s, end_s=end_s, fleet=fleet, progress=_progress(as_json=as_json)
        )

    if url is not None:
        found = drawn(Prometheus(url), time.time())
    else:
        assert directory is not None
        with over_directory(directory) as server:
            found = drawn(server, server.newest_s() or time.time())
    try:
        out.write_text(as_html(found.svg, chosen.title) if out.suffix == ".html" else found.svg)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; give another file") from error
    told = {"out": str(out), "dashboard": chosen.uid, "panels": found.num_panels, "empty": list(found.empty)}
    if as_json:
        rendering.print_json(told)
        return
    empty = f"; without data: {', '.join(found.empty)}" if found.empty else ""
    print(f"{out}: {found.num_panels} panels{empty}")


def _progress(*, as_json: bool) -> Callable[[str], None]:
    if as_json or not sys.stderr.isatty():
        return lambda _: None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
