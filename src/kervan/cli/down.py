"""`kervan down`."""

import click

from kervan.cli import option_types, options

GRACE_S = 300.0


@click.command()
@click.option("--graceful", is_flag=True, help="Reject new requests, and stop when all streams have ended.")
@click.option(
    "--deadline", type=option_types.DURATION,
    help="With --graceful: how long to wait, like 10min. [default: 5min]",
)  # fmt: skip
@options.name
@options.address
@options.as_json
def down(graceful: bool, deadline: float | None, name: str, address: str | None, as_json: bool) -> None:
    """Stop a fleet; with the last one, also the Ray that kervan started.

    Open streams get `drain_timeout_s` to end. With --graceful they get --deadline; if some are still open then, the
    fleet keeps running.
    """
    from kervan.cli import render
    from kervan.serve import down as serve_down

    if deadline is not None and not graceful:
        raise click.UsageError("--deadline is for --graceful")
    if graceful:
        deadline_s = GRACE_S if deadline is None else deadline
        serve_down.let_streams_end(name, deadline_s, address, render.progress_lines(is_quiet=as_json))
    how = serve_down.down(name, address)
    if as_json:
        render.print_json({"name": name, "result": how})
    else:
        print(f"{name}: {how}")
