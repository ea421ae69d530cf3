"""`kervan usage`."""

from typing import Any, Literal

import click

from kervan.cli import options

COLUMNS = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "rejected", "streams")


@click.command()
@click.option("--by", type=click.Choice(["key", "model"]), default="key", show_default=True, help="A line for each.")
@options.name
@options.address
@options.as_json
def usage(by: Literal["key", "model"], name: str, address: str | None, as_json: bool) -> None:
    """Show what each API key has used since the fleet started: requests, tokens, refusals, streams now.

    Requests and tokens are counted when streams end. What revoked keys have used is shown too.
    """
    from kervan.cli import render
    from kervan.serve import usage as serve_usage

    told = serve_usage.usage(name, address)
    rows = told.by_key() if by == "key" else told.by_model()
    if as_json:
        render.print_json({"since_s": told.since_s, f"{by}s": rows})
        return
    import datetime

    from rich.table import Table

    since = datetime.datetime.fromtimestamp(told.since_s, datetime.UTC)
    table = Table(by, box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for row in [*rows, *([_sum(rows)] if len(rows) > 1 else [])]:
        table.add_row(row["name"], *(f"{row[column]:,}" for column in COLUMNS))
    console = render.open_console()
    console.print(f"{name} since {since:%Y-%m-%d %H:%M:%S} UTC", markup=False)
    console.print(table)


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": "all", **{column: sum(row[column] for row in rows) for column in COLUMNS}}
