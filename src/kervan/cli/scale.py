"""`kervan scale`."""

from typing import Any

import click

from kervan.cli import options


@click.command()
@click.argument("replicas", type=options.Count(), required=False)
@options.pools
@click.option("--gateways", type=options.Count(), help="HTTP gateways; MIN..MAX: scaled by load.")
@options.name
@options.address
@options.as_json
def scale(
    replicas: tuple[int, int] | None,
    pools: tuple[str, ...],
    gateways: tuple[int, int] | None,
    name: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Run REPLICAS engine replicas, or the given number per pool; returns when they are ready, or gone.

    MIN..MAX: as many as the load needs; returns when the least are ready. A plain number is fixed.
    """
    from kervan.cli import render
    from kervan.serve import changes

    if replicas is None and gateways is None and not pools:
        raise click.UsageError("give REPLICAS or --pool, --gateways, or both")
    if replicas is not None and pools:
        given = f"{replicas[0]}..{replicas[1]}" if replicas[1] else replicas[0]
        raise click.UsageError(f"{given} and --pool both set the number of replicas; give only the pools")
    if gateways is not None and gateways[0] < 1:
        raise click.UsageError("--gateways 0 would leave nothing to serve requests; give at least 1, or kervan down")
    settings: dict[str, Any] = options.gateway_settings(gateways) | options.replica_settings(replicas)
    settings |= options.pool_settings(pools)
    result = changes.scale(name, settings, address, render.progress_lines(is_quiet=as_json))
    if as_json:
        render.print_json(result.to_dict())
    else:
        render.print_status(result)
