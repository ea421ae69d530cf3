"""`kervan fault`."""

from typing import get_args

import click

from kervan.cli import options
from kervan.config.fault import Fault, FaultKind

AMOUNTS = {
    "slow": (1.0, 1e6, "how many times as long a step takes, at least 1"),
    "crash": (0.0, 1e12, "the tokens after which it dies"),
    "kv-pressure": (0.0, 1.0, "the share of the KV cache to take away, 0 to 1"),
}


@click.command()
@click.argument("replica")
@click.argument("kind", type=click.Choice(get_args(FaultKind)))
@click.argument("amount", type=float, required=False)
@options.name
@options.address
def fault(replica: str, kind: FaultKind, amount: float | None, name: str, address: str | None) -> None:
    """Inject a fault into a simulated REPLICA (--engine twin).

    slow AMOUNT: steps take AMOUNT times as long. hang: no further step completes; the watchdog detects it.
    crash AMOUNT: the process dies after AMOUNT more tokens. kv-pressure AMOUNT: this share of the KV cache is taken
    away. none: ends the fault.
    """
    from kervan.serve.fault import suffer

    if kind in AMOUNTS:
        low, high, meaning = AMOUNTS[kind]
        if amount is None or not low <= amount <= high:
            raise click.UsageError(f"{kind} needs AMOUNT: {meaning}")
    elif amount is not None:
        raise click.UsageError(f"{kind} takes no AMOUNT")
    suffer(name, replica, Fault(kind, amount or 0.0), address)
