"""`kervan rotate-keys`."""

import click

from kervan.cli import options


@click.command()
@options.name
@options.address
@click.option("--yes", is_flag=True, help="Go on where there is no room for new replicas beside the old ones.")
@options.as_json
def rotate_keys(name: str, address: str | None, yes: bool, as_json: bool) -> None:
    """Give a fleet another secret, and every replica and gateway other keys; returns when none of the old is left.

    Replicas and gateways are replaced one after the other, as for other settings, and streams move to the new ones. The
    secret before is taken for 15 minutes more by what has just started, and then no more.
    """
    from kervan.cli import render
    from kervan.serve import changes

    status = changes.rotate_keys(name, address, render.progress_lines(is_quiet=as_json), is_confirmed=yes)
    if as_json:
        render.print_json(status.to_dict())
    else:
        print(f"fleet {name!r} has new keys (generation {status.config.key_generation})")
        render.print_status(status)
