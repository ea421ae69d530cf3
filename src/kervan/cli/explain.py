"""`kervan explain`."""

import sys
from typing import Any

import click

from kervan.cli import options

BAR = 24


@click.command()
@click.argument("request_id")
@options.name
@options.address
@click.option("--url", help="Of a gateway, like http://127.0.0.1:8000; without it, the fleet's own.")
@click.option("--api-key", help="If the fleet wants one; or KERVAN_API_KEY.")
@options.as_json
def explain(
    request_id: str, name: str, address: str | None, url: str | None, api_key: str | None, as_json: bool
) -> None:
    """Show where the time of one request went: queues, prefill, decode, each move.

    REQUEST_ID is the `id` of its answer, the header X-Kervan-Stream-Id, or the X-Request-Id that the client sent. Each
    gateway remembers its last requests (remembered_requests) and those in flight.
    """
    from kervan import direct_http
    from kervan.cli import render
    from kervan.serve import explaining

    where = direct_http.parse_url(url, "--url") if url else explaining.gateway_url(name, address)
    told = explaining.ask(where, name, request_id, options.client_key(api_key))
    if as_json:
        render.print_json(told)
    else:
        print_request(told)


def print_request(told: dict[str, Any]) -> None:
    """A head line, a table of parts for each stream, and a line for each move."""
    from rich.console import Console
    from rich.table import Table

    from kervan.units import format_duration, plural

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    state = "in flight for" if told["is_open"] else f"status {told['status']}, took"
    console.print(
        f"{told['method']} {told['path']} at {told['received']}: {state} {format_duration(told['seconds'])}, "
        f"gateway {told['gateway']}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    whole_s = max(told["seconds"], 1e-9)
    for stream in told["streams"] or [None]:
        table = Table("part", box=None, pad_edge=False, header_style="dim")
        table.add_column("start", justify="right")
        table.add_column("took", justify="right")
        table.add_column("share", justify="right")
        table.add_column("")
        table.add_column("what", overflow="fold")
        parts = [*told["before"], *(stream["parts"] if stream else [])]
        if told["delivery_s"]:
            parts.append({"part": "delivery", "start_s": whole_s - told["delivery_s"], "seconds": told["delivery_s"]})
        for part in parts:
            share = part["seconds"] / whole_s
            table.add_row(
                part["part"] + ("..." if part.get("is_open") else ""), format_duration(part["start_s"]),
                format_duration(part["seconds"]), f"{share:.0%}", "#" * round(BAR * share), _what(part),
            )  # fmt: skip
        if stream:
            ended = stream["ended"] or "runs"
            console.print(
                f"\nstream {stream['request_id']}: {stream['prompt_tokens']:,} prompt tokens, "
                f"{stream['output_tokens']:,} generated, {ended}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        with console.capture() as drawn:
            console.print(table)
        click.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))
        for move in stream["moves"] if stream else []:
            pause = f"{format_duration(move['pause_s'])} without a token" if move["pause_s"] else "it had no token yet"
            console.print(
                f"moved ({move['reason']}) from {move['source']} to {move['target'] or '(none yet)'} after "
                f"{plural(move['after_tokens'], 'token')}: {pause}, {move['prefilled_tokens']:,} tokens computed again",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        if stream and stream["steps_left_out"]:
            console.print(f"{stream['steps_left_out']} more steps were not kept", style="dim")
    if told["num_streams"] > len(told["streams"]):
        console.print(f"{told['num_streams'] - len(told['streams'])} more streams were not kept", style="dim")
    for later in told["later"]:
        click.echo()
        print_request(later)


def _what(part: dict[str, Any]) -> str:
    words = [part.get("replica", "")]
    if part.get("tokens"):
        cached = f", {part['cached_tokens']:,} cached" if part.get("cached_tokens") else ""
        words.append(f"{part['tokens']:,} tokens{cached}")
    words.append(part.get("why", ""))
    return "; ".join(filter(None, words))
