"""`kervan status`."""

import click

from kervan.cli import options


@click.command()
@options.name
@options.address
@click.option("--why", "with_why", is_flag=True, help="Explain in one sentence each why something is not ready.")
@options.as_json
def status(name: str, address: str | None, with_why: bool, as_json: bool) -> None:
    """Show a fleet: its replicas, their load, its gateways."""
    from kervan.cli import render
    from kervan.serve import status as serve_status

    sentences = None
    if with_why:
        shown, sentences = serve_status.why(name, address)
    else:
        shown = serve_status.status(name, address)
    if as_json:
        render.print_json(shown.to_dict() | ({} if sentences is None else {"why": sentences}))
        return
    render.print_status(shown)
    if sentences is not None:
        print("\n".join(sentences) or "no problems found")
