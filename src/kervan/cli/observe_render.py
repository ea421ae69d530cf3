"""`kervan observe render`."""

from pathlib import Path

import click

from kervan.cli import option_types, options, outputs
from kervan.errors import ConfigError, FleetError


@click.command()
@click.argument("directory", metavar="DIR", type=option_types.FILE)
@click.option(
    "--scrape", "how", type=click.Choice(("static", "ray", "kubernetes")), default="static", show_default=True,
    help="Where Prometheus finds its targets. ray: Ray's own metrics too; kubernetes: objects of its operator.",
)  # fmt: skip
@options.name
@options.address
@click.option(
    "--target", "targets", type=option_types.RENDEZVOUS, multiple=True, metavar="HOST:PORT",
    help="A node with gateways; repeatable. By default those of the running fleet.",
)  # fmt: skip
@click.option(
    "--dcgm", type=option_types.RENDEZVOUS, multiple=True, metavar="HOST:PORT",
    help="A dcgm-exporter, for the GPUs; repeatable.",
)  # fmt: skip
@click.option(
    "--objective", type=option_types.SHARE, default="99%", show_default=True,
    help="Share of the streams that is to keep the SLO; the burn-rate alerts' budget is the rest.",
)  # fmt: skip
@click.option("--ca", type=option_types.FILE, help="File, where Prometheus runs, that verifies gateways' TLS.")
@click.option("--server-name", help="The name in the gateways' certificate, if they are asked by another.")
@click.option("--namespace", default="default", show_default=True, help="Of Kubernetes' objects.")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE",
    help="By which a Prometheus operator chooses its objects, like release=prometheus; repeatable.",
)  # fmt: skip
@options.as_json
def render(
    directory: Path, how: str, name: str, address: str | None, targets: tuple[str, ...], dcgm: tuple[str, ...],
    objective: float, ca: Path | None, server_name: str | None, namespace: str, labels: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Write scrape configuration, recording and alert rules, and dashboards into DIR."""
    from kervan.cli import render as rendering
    from kervan.cluster.request import check_namespace
    from kervan.observe.render import files
    from kervan.observe.render.scrape import ScrapeTls

    outputs.check_directory("DIR", directory if directory.exists() else directory.parent)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"DIR {directory} is a file; give a directory")
    if not 0 < objective < 1:
        raise ConfigError(f"--objective {objective:g} leaves no budget, or nothing else; write for example 99%")
    targets, dcgm = tuple(dict.fromkeys(targets)), tuple(dict.fromkeys(dcgm))
    fleet = ""
    tls = ScrapeTls(str(ca or ""), server_name or "") if ca or server_name else None
    if how == "kubernetes":
        if ca is not None or (tls is not None and not tls.server_name):
            raise click.UsageError(
                "--ca is a file of Prometheus' machine; the operator takes a Secret: give --server-name, and add "
                "tlsConfig.ca to monitors.yaml if your CA is none of the system's"
            )
        check_namespace(namespace)
        texts = files.for_kubernetes(namespace=namespace, labels=_labels(labels), objective=objective, tls=tls)
    else:
        if labels:
            raise click.UsageError("--label is for --scrape kubernetes")
        if not targets:
            targets, fleet, is_https = _targets(name, address)
            tls = tls or (ScrapeTls() if is_https else None)
        texts = files.for_prometheus(
            directory, targets, fleet=fleet, dcgm=dcgm, has_ray=how == "ray", objective=objective, tls=tls
        )
    written = outputs.write_files("DIR", directory, texts)
    if as_json:
        rendering.print_json({"files": [str(path) for path in written], "targets": list(targets), "fleet": fleet})
        return
    for path in written:
        print(path)
    if how == "kubernetes":
        print(f"next: kubectl apply -f {directory}")
    else:
        print(f"next: prometheus --config.file={directory / 'prometheus.yml'}    (targets: {', '.join(targets)})")


def _labels(texts: tuple[str, ...]) -> dict[str, str]:
    """Raises: ConfigError for what Kubernetes takes for no label, and for one that is given twice."""
    from kervan.cluster.request import check_label

    found: dict[str, str] = {}
    for text in texts:
        key, value = options.parse_assignment(text, "--label")
        check_label(key, value)
        if found.setdefault(key, value) != value:
            raise ConfigError(f"--label gives {key} twice, {found[key]!r} and {value!r}; give it once")
    return found


def _targets(name: str, address: str | None) -> tuple[tuple[str, ...], str, bool]:
    """HOST:PORT of each node of a running fleet that has a gateway; the fleet's name if others share the port; HTTPS?

    Raises: FleetError when there is no such fleet, or it has no gateway.
    """
    from kervan.serve.attach import attach

    directory = attach(name, address)
    gateways = directory.snapshot().result().gateways
    if not gateways:
        raise FleetError(f"fleet {name!r} has no gateway yet; wait for kervan status to show one, or give --target")
    config = directory.fleet().result().config
    hosts = sorted({gateway.url.partition("://")[2] for gateway in gateways})
    return tuple(hosts), name if config.shared_port else "", bool(config.tls_certificate)
