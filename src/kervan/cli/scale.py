"""`kervan scale`."""

import click

from kervan.cli import options


@click.command()
@click.argument("replicas", type=click.IntRange(min=0), required=False)
@click.option("--gateways", type=click.IntRange(min=1), help="HTTP gateways.")
@options.name
@options.address
@options.as_json
def scale(replicas: int | None, gateways: int | None, name: str, address: str | None, as_json: bool) -> None:
    """Run REPLICAS engine replicas; returns when they are ready, or gone."""
    from kervan.cli import render
    from kervan.serve.changes import scale as change

    if replicas is None and gateways is None:
        raise click.UsageError("give REPLICAS, --gateways, or both")
    result = change(name, replicas, gateways, address, render.progress_lines(is_quiet=as_json))
    if as_json:
        render.print_json(result.to_dict())
    else:
        render.print_status(result)
