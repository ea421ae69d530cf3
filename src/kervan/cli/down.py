"""`kervan down`."""

import click

from kervan.cli import options


@click.command()
@options.name
@options.address
@options.as_json
def down(name: str, address: str | None, as_json: bool) -> None:
    """End a fleet; with the last one, the Ray that kervan started."""
    from kervan.cli import render
    from kervan.serve import fleet

    how = fleet.down(name, address)
    if as_json:
        render.print_json({"name": name, "result": how})
    else:
        print(f"{name}: {how}")
