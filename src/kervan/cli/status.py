"""`kervan status`."""

import click

from kervan.cli import options


@click.command()
@options.name
@options.address
@options.as_json
def status(name: str, address: str | None, as_json: bool) -> None:
    """Show a fleet: its replicas, their load, its gateways."""
    from kervan.cli import render
    from kervan.serve import fleet

    found = fleet.status(name, address)
    if as_json:
        render.print_json(found.to_dict())
    else:
        render.print_status(found)
