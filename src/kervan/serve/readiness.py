"""Waiting until a fleet is as its settings say."""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kervan import errors
from kervan.config.fleet import FleetConfig
from kervan.errors import EngineError, FleetError, KervanError
from kervan.fleet.directory import Snapshot, StartFailure
from kervan.serve import cluster, pools
from kervan.serve.directory.client import DirectoryClient, find_directory
from kervan.serve.status import FleetStatus, fleet_status, reasons
from kervan.serve.versions import versions
from kervan.units import plural

POLL_S = 0.2
PATIENCE_S = 15.0


def wait_until_ready(
    config: FleetConfig,
    directory: DirectoryClient,
    progress: Callable[[str], None],
    *,
    after_failure: int = 0,
    awaited: Mapping[str, int],
) -> FleetStatus:
    """Wait for all replicas and gateways of this config, and until those of an earlier one are gone.

    `awaited`: replicas by pool; of a fleet with pools, there may be more. Waits as long as it takes, but not for spot
    replicas whose nodes have gone meanwhile; tells why when nothing has changed for `PATIENCE_S`.

    Raises: the KervanError that a replica or gateway reported with a number above `after_failure`.
    """
    made = versions(config)
    last_line = ""
    changed_s, explained = time.monotonic(), set[str]()
    while True:
        try:
            snapshot = directory.snapshot().result()
        except FleetError as error:
            find_directory(config.name)  # raises when it is gone for good; else what was asked for is under way
            progress(str(error))
            time.sleep(POLL_S)
            continue
        for failure in snapshot.failures:
            if failure.number > after_failure:
                raise _as_error(failure)
        ready = sum(r.state == "ready" and r.version == made.replicas for r in snapshot.replicas)
        answering = sum(g.is_ready and g.version == made.gateways for g in snapshot.gateways)
        present = sum(g.version == made.gateways for g in snapshot.gateways)
        line = f"{ready}/{sum(awaited.values())} replicas and {answering}/{config.gateways} gateways ready"
        old = len(snapshot.replicas) - sum(r.version == made.replicas for r in snapshot.replicas)
        old_gateways = len(snapshot.gateways) - present
        if old or old_gateways:
            line += f", {plural(old, 'replica')} and {plural(old_gateways, 'gateway')} to go"
        if line != last_line:
            last_line, changed_s = line, time.monotonic()
            progress(line)
        elif time.monotonic() - changed_s > PATIENCE_S:
            changed_s = time.monotonic()
            if config.pools:
                now = pools.placeable(config, cluster.nodes_for(config), pools.held(snapshot))
                awaited = {pool: min(count, pools.awaited(config, now)[pool]) for pool, count in awaited.items()}
            for reason in reasons(config, snapshot):
                if (kind := re.sub(r"\d+ s\b", "", reason)) not in explained:  # not again with another time
                    explained.add(kind)
                    progress(reason)
        is_settled = pools.are_settled(config, snapshot, awaited)
        is_settled &= config.gateways <= len(snapshot.gateways) <= max(config.gateways, config.max_gateways)
        if is_settled and not (old or old_gateways) and (answering == present or not any(awaited.values())):
            return fleet_status(config, snapshot)
        time.sleep(POLL_S)


def slowest_start(snapshot: Snapshot) -> str:
    """The seconds and the parts of the longest start among the replicas; empty without any."""
    starts = [r.start_s for r in snapshot.replicas if r.start_s]
    if not starts:
        return ""
    parts = max(starts, key=lambda start: sum(start.values()))
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
    return f"{sum(parts.values()):.1f} s: {phases}"


def _as_error(failure: StartFailure) -> KervanError:
    known: type[KervanError] = getattr(errors, failure.kind, EngineError)
    where = f" (log: {failure.log_path})" if failure.log_path and Path(failure.log_path).exists() else ""
    if failure.kind in ("ConfigError", "CapacityError"):
        where = ""
    return known(f"{failure.message}{where}")
