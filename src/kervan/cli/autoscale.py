"""`kervan autoscale`."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from kervan.cli import option_types, options
from kervan.config.autoscale import POLICIES
from kervan.errors import ConfigError, FleetError

PERIOD_S = 1.0


@click.command()
@options.name
@options.address
@click.option("--dry-run", is_flag=True, help="Show what a policy would do with the present load; nothing is done.")
@click.option("--policy", type=click.Choice(POLICIES), help="Another policy than the fleet's; for --dry-run.")
@click.option(
    "--duration", "duration_s", type=option_types.DURATION, default="10s", show_default=True, help="Of --dry-run."
)
@options.as_json
def autoscale(
    name: str, address: str | None, dry_run: bool, policy: str | None, duration_s: float, as_json: bool
) -> None:
    """Show how the number of replicas is decided: the policy, its last decisions, and their reasons.

    With --dry-run, a policy is asked each second for --duration, and its answers are shown beside what is.
    """
    from kervan.cli import render
    from kervan.serve.attach import attach

    if policy is not None and not dry_run:
        raise click.UsageError("--policy is for --dry-run; kervan up --policy changes that of the fleet")
    directory = attach(name, address)
    if dry_run:
        rows = []
        for row in _dry_run(directory, policy or "", duration_s):
            rows.append(row)
            if not as_json:
                print(_line(row), flush=True)
        if as_json:
            render.print_json({"name": name, "policy": rows[-1]["policy"] if rows else policy, "decisions": rows})
        return
    from kervan.serve.status import scaling_to_dict
    from kervan.serve.why import scaling_lines

    scaling = directory.observed().result().scaling
    if as_json:
        render.print_json({"name": name, **scaling_to_dict(scaling)})
        return
    print("\n".join(scaling_lines(scaling)))
    if scaling.problem:
        print(scaling.problem)


def _dry_run(directory: Any, policy_name: str, duration_s: float) -> Iterator[dict[str, Any]]:
    """What a policy decides for each state of the fleet that is new, until `duration_s` are over.

    Raises: ConfigError for a fleet of a fixed number; FleetError when the directory is away, or has seen nothing.
    """
    from kervan.serve.scaler import policies

    config = directory.fleet().result().config
    if config.autoscaler is None:
        bounds = ", ".join(f"{pool} {number}" for pool, number in config.bounds.items())
        raise ConfigError(
            f"fleet {config.name!r} has a fixed number of replicas ({bounds}), and a policy nothing to decide; give it "
            f"a choice: kervan scale {config.replicas or 1}..{2 * (config.replicas or 1)}"
        )
    seen = directory.observed().result()
    policy = policies.of_fleet(config, seen.kinds, name=policy_name)
    assert policy is not None
    memory: Mapping[str, Any] = seen.memory if policy.name == seen.scaling.policy else {}
    end_s = time.monotonic() + duration_s
    last_s, is_any = -1.0, False
    while True:
        if seen.state is not None and seen.state.now_s > last_s:
            last_s, is_any = seen.state.now_s, True
            decision = policy.decide(seen.state, memory)
            memory = decision.memory
            yield {
                "at_s": time.time(),
                "policy": policy.name,
                "targets": dict(decision.targets),
                "now": dict(seen.scaling.targets),
                "reason": decision.reason,
                "numbers": dict(decision.numbers),
                "leaving": list(decision.leaving),
            }
        if time.monotonic() >= end_s:
            break
        time.sleep(min(PERIOD_S, max(0.0, end_s - time.monotonic())))
        seen = directory.observed().result()
    if not is_any:
        raise FleetError(f"fleet {config.name!r} has told nothing yet; try again in a few seconds")


def _line(row: Mapping[str, Any]) -> str:
    changes = [
        f"{pool} {now} -> {row['targets'][pool]}" if row["targets"].get(pool, now) != now else f"{pool} {now}"
        for pool, now in row["now"].items()
    ]
    at = time.strftime("%X", time.localtime(row["at_s"]))
    return f"{at} {row['policy']}: {', '.join(changes)}: {row['reason']}"
