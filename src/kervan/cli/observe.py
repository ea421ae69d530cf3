"""`kervan observe`: what Prometheus and Grafana need, and dashboards without Grafana."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from kervan.cli import option_types, options, outputs
from kervan.errors import ConfigError, FleetError

MIN_S = 10.0


@click.group()
def observe() -> None:
    """Metrics, alerts and dashboards of fleets, for Prometheus and Grafana."""


@observe.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--scrape", "how", type=click.Choice(("static", "ray", "kubernetes")), default="static", show_default=True,
    help="Where Prometheus finds its targets. ray: Ray's own metrics too; kubernetes: objects of its operator.",
)  # fmt: skip
@options.name
@options.address
@click.option(
    "--target", "targets", multiple=True, metavar="HOST:PORT",
    help="A node with gateways; repeatable. By default those of the running fleet.",
)  # fmt: skip
@click.option("--dcgm", multiple=True, metavar="HOST:PORT", help="A dcgm-exporter, for the GPUs; repeatable.")
@click.option(
    "--objective", type=option_types.SHARE, default="99%", show_default=True,
    help="Share of the streams that is to keep the SLO; the burn-rate alerts' budget is the rest.",
)  # fmt: skip
@click.option("--namespace", default="default", show_default=True, help="Of Kubernetes' objects.")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE",
    help="By which a Prometheus operator chooses its objects, like release=prometheus; repeatable.",
)  # fmt: skip
@options.as_json
def render(
    directory: Path, how: str, name: str, address: str | None, targets: tuple[str, ...], dcgm: tuple[str, ...],
    objective: float, namespace: str, labels: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Write scrape configuration, recording and alert rules, and dashboards into DIR."""
    from kervan.cli import render as rendering
    from kervan.observe.render import files

    outputs.check_directory("DIR", directory if directory.exists() else directory.parent)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"DIR {directory} is a file; give a directory")
    if not 0 < objective < 1:
        raise ConfigError(f"--objective {objective:g} leaves no budget, or nothing else; write for example 99%")
    for option, hosts in (("--target", targets), ("--dcgm", dcgm)):
        for host in hosts:
            option_types.RENDEZVOUS.parse(host, option)
    fleet = ""
    if how == "kubernetes":
        pairs = dict(options.parse_assignment(text, "--label") for text in labels)
        written = files.for_kubernetes(directory, namespace=namespace, labels=pairs, objective=objective)
    else:
        if labels:
            raise click.UsageError("--label is for --scrape kubernetes")
        if not targets:
            targets, fleet = _targets(name, address)
        written = files.for_prometheus(
            directory, targets, fleet=fleet, dcgm=dcgm, has_ray=how == "ray", objective=objective
        )
    if as_json:
        rendering.print_json({"files": [str(path) for path in written], "targets": list(targets), "fleet": fleet})
        return
    for path in written:
        print(path)
    if how == "kubernetes":
        print(f"next: kubectl apply -f {directory}")
    else:
        print(f"next: prometheus --config.file={directory / 'prometheus.yml'}    (targets: {', '.join(targets)})")


def _targets(name: str, address: str | None) -> tuple[tuple[str, ...], str]:
    """HOST:PORT of each node of a running fleet that has a gateway; the fleet's name if others share the port.

    Raises: FleetError when there is no such fleet, or it has no gateway.
    """
    from kervan.serve.attach import attach

    directory = attach(name, address)
    gateways = directory.snapshot().result().gateways
    if not gateways:
        raise FleetError(f"fleet {name!r} has no gateway yet; wait for kervan status to show one, or give --target")
    config = directory.fleet().result().config
    hosts = sorted({gateway.url.partition("://")[2] for gateway in gateways})
    return tuple(hosts), name if config.shared_port else ""


@observe.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
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
