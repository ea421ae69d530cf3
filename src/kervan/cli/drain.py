"""`kervan drain`."""

import click

from kervan.cli import option_types, options


@click.command()
@click.argument("target", metavar="REPLICA|NODE")
@click.option(
    "--deadline", type=option_types.DURATION, default="90s", show_default=True,
    help="Time until it must be gone, like 30s or 2min.",
)  # fmt: skip
@options.name
@options.address
@options.as_json
def drain(target: str, deadline: float, name: str, address: str | None, as_json: bool) -> None:
    """Take REPLICA, or everything on NODE, out of service; returns when it is gone.

    It gets no new requests, and its streams continue on other replicas. NODE is an address or a Ray node id; all fleets
    of the cluster leave it, and Ray schedules nothing there until Ray is restarted on the node.
    """
    from kervan.cli import render
    from kervan.serve import drain as serve_drain
    from kervan.units import format_duration

    drained = serve_drain.drain(name, target, deadline, address, render.progress_lines(is_quiet=as_json))
    if as_json:
        render.print_json(drained.to_dict())
        return
    what = ", ".join([*drained.replicas, *drained.gateways]) or "nothing was there"
    print(f"drained in {format_duration(drained.took_s)}: {what}; {drained.moved} streams moved")
