"""`kervan status`."""

import click

from kervan.cli import options


@click.command()
@options.name
@options.address
@click.option(
    "--why", "with_why", is_flag=True, help="Say why something is not ready, and why there are so many replicas."
)
@options.as_json
def status(name: str, address: str | None, with_why: bool, as_json: bool) -> None:
    """Show a fleet: its replicas, their load, its gateways."""
    from kervan.cli import render
    from kervan.errors import FleetError
    from kervan.serve import status as serve_status
    from kervan.serve.why import scaling_lines

    try:
        shown = serve_status.status(name, address)
    except FleetError as error:
        render.print_partial_status(name, error, as_json=as_json)
        raise
    sentences: list[str] | None = None
    problem: FleetError | None = None
    if with_why:
        try:
            sentences = serve_status.reasons(shown.config, shown.snapshot)
        except FleetError as error:  # the rest is known, and shown
            problem = error
    if as_json:
        render.print_json(shown.to_dict() | ({"why": sentences} if with_why else {}))
    else:
        render.print_status(shown)
        if with_why and shown.snapshot.scaling is not None and shown.config.autoscaler is not None:
            print("\n".join(scaling_lines(shown.snapshot.scaling)[1:]))
        if sentences is not None:
            print("\n".join(sentences) or "no problems found")
    if problem is not None:
        raise problem
