"""Waiting until a fleet is as its settings say."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kervan import errors
from kervan.config.fleet import FleetConfig
from kervan.errors import EngineError, FleetError, KervanError
from kervan.fleet.directory import Snapshot, StartFailure
from kervan.serve import cluster, pools
from kervan.serve.directory.client import DirectoryClient, find_directory
from kervan.serve.status import FleetStatus, fleet_status, reasons
from kervan.serve.versions import Versions, versions
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
    current = versions(config)
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
        readiness = _readiness(snapshot, current)
        line = readiness.line(sum(awaited.values()), config.gateways)
        if line != last_line:
            last_line, changed_s = line, time.monotonic()
            progress(line)
        elif time.monotonic() - changed_s > PATIENCE_S:
            changed_s = time.monotonic()
            awaited = _still_awaited(config, snapshot, awaited)
            for reason in reasons(config, snapshot):
                if (kind := re.sub(r"\d+ s\b", "", reason)) not in explained:  # not again with another time
                    explained.add(kind)
                    progress(reason)
        is_settled = pools.are_settled(config, snapshot, awaited)
        is_settled &= config.gateways <= len(snapshot.gateways) <= max(config.gateways, config.max_gateways)
        all_answer = readiness.ready_gateways == readiness.gateways or not any(awaited.values())
        if is_settled and all_answer and not (readiness.old_replicas or readiness.old_gateways):
            return fleet_status(config, snapshot)
        time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class _Readiness:
    """Replicas and gateways of the latest settings, and of earlier ones."""

    ready_replicas: int
    ready_gateways: int
    gateways: int
    old_replicas: int
    old_gateways: int

    def line(self, awaited_replicas: int, awaited_gateways: int) -> str:
        """Like "1/2 replicas and 0/1 gateways ready"."""
        line = (
            f"{self.ready_replicas}/{awaited_replicas} replicas and "
            f"{self.ready_gateways}/{awaited_gateways} gateways ready"
        )
        if not (self.old_replicas or self.old_gateways):
            return line
        return f"{line}, {plural(self.old_replicas, 'replica')} and {plural(self.old_gateways, 'gateway')} to go"


def _readiness(snapshot: Snapshot, current: Versions) -> _Readiness:
    replicas = [replica for replica in snapshot.replicas if replica.version == current.replicas]
    gateways = [gateway for gateway in snapshot.gateways if gateway.version == current.gateways]
    return _Readiness(
        ready_replicas=sum(replica.state == "ready" for replica in replicas),
        ready_gateways=sum(gateway.is_ready for gateway in gateways),
        gateways=len(gateways),
        old_replicas=len(snapshot.replicas) - len(replicas),
        old_gateways=len(snapshot.gateways) - len(gateways),
    )


def _still_awaited(config: FleetConfig, snapshot: Snapshot, awaited: Mapping[str, int]) -> Mapping[str, int]:
    """The part of `awaited` that can be placed on the nodes that are there now."""
    if not config.pools:
        return awaited
    room = pools.placeable(config, cluster.nodes_for(config), pools.held(snapshot))
    can_come = pools.awaited(config, room)
    return {pool: min(count, can_come[pool]) for pool, count in awaited.items()}


def slowest_start(snapshot: Snapshot) -> str:
    """The seconds and the parts of the longest start among the replicas; empty without any."""
    starts = [r.start_s for r in snapshot.replicas if r.start_s]
    if not starts:
        return ""
    parts = max(starts, key=lambda start: sum(start.values()))
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
    return f"{sum(parts.values()):.1f} s: {phases}"


def _as_error(failure: StartFailure) -> KervanError:
    error_class: type[KervanError] = getattr(errors, failure.kind, EngineError)
    where = f" (log: {failure.log_path})" if failure.log_path and Path(failure.log_path).exists() else ""
    return error_class(f"{failure.message}{where}")
