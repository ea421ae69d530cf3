"""The end of a fleet: what `kervan down` calls."""

import contextlib
import time
from collections.abc import Callable
from typing import Literal

from kervan.errors import FleetError, KervanError
from kervan.serve import cluster
from kervan.serve.attach import attach
from kervan.serve.cluster import NoClusterError
from kervan.serve.directory.client import NoFleetError, find_directory, fleet_names
from kervan.serve.ray_errors import ANSWER_TIMEOUT_S
from kervan.units import plural

POLL_S = 0.2
REOPEN_TIMEOUT_S = 5.0
HEARD_S = 2.5  # after which all gateways have heard of a change, and all counts are newer


def down(name: str, address: str | None = None) -> Literal["stopped", "stopped with Ray"]:
    """End a fleet, and with the last fleet the Ray that kervan started.

    Raises: FleetError when there is no such fleet.
    """
    local = cluster.find_local_ray()
    entry = cluster.recall(name)
    if entry is not None and address is None and local is None:
        # The local Ray is gone (a reboot, a kill), or the cluster: nothing is left to end but the memory of the fleet.
        # A cluster that is there and does not let us in has the fleet still.
        with contextlib.suppress(*(NoClusterError, NoFleetError) if entry.is_joined else (KervanError,)):
            attach(name, address)
            end_fleet(name)
        cluster.forget(name)
        return "stopped"
    where = address or (entry.address if entry else "") or (local.address if local else "")
    is_local = local is not None and where == local.address
    try:
        _find(name, address)
        end_fleet(name)
    except NoFleetError:
        raise
    except FleetError:
        others = [fleet for fleet in cluster.remembered() if fleet.address == where and fleet.name != name]
        if local is None or not is_local or others:
            raise
        # Ray or Serve does not answer, and has nothing but this fleet.
        cluster.forget(name)
        cluster.stop_local_ray(local)
        return "stopped with Ray"
    cluster.forget(name)
    if local is not None and is_local and not fleet_names():
        import ray

        ray.shutdown()
        cluster.stop_local_ray(local)
        return "stopped with Ray"
    return "stopped"


def _find(name: str, address: str | None) -> None:
    """Reach the fleet's cluster. Raises: as `attach`, but for a fleet that only its directory has left."""
    try:
        attach(name, address)
    except NoFleetError:
        from kervan.serve import app  # with Ray, whose environment is set before by `attach`

        if app.served(name, ANSWER_TIMEOUT_S) is None:
            raise


def let_streams_end(
    name: str, deadline_s: float, address: str | None = None, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Let a fleet's gateways take no more requests, and wait until all streams have ended.

    Raises: FleetError when some are left after `deadline_s`; the gateways take requests again then, as they do when the
    wait is given up (Ctrl-C).
    """
    directory = attach(name, address)
    begin_s = time.monotonic()
    last_line = ""
    is_over = False
    try:
        while True:
            # Asked again and again: a directory that was started anew knows nothing of it.
            snapshot = directory.set_closing(True).result()
            at_gateways = sum(gateway.streams for gateway in snapshot.gateways)
            streams = max(at_gateways, sum(replica.running + replica.waiting for replica in snapshot.replicas))
            waited_s = time.monotonic() - begin_s
            if waited_s > HEARD_S and not streams:
                is_over = True
                return
            line = f"waiting for {plural(streams, 'stream')}"
            if waited_s > deadline_s:
                raise FleetError(
                    f"{line} after {waited_s:.0f} s, and --deadline was {deadline_s:.0f} s; fleet {name!r} accepts "
                    "requests again; use a longer --deadline, or omit --graceful to cut them off"
                )
            if streams and line != last_line:
                last_line = line
                progress(line)
            time.sleep(POLL_S)
    finally:
        if not is_over:
            try:
                directory.set_closing(False).result(REOPEN_TIMEOUT_S)
            except FleetError as error:  # what ended the wait is raised next
                progress(f"fleet {name!r} may go on refusing requests: {error}")


def end_fleet(name: str) -> None:
    """End the application, then the directory, without which the fleet is no longer listed.

    Raises: FleetError when Ray or Serve does not answer; the fleet goes on as it was if Serve does not.
    """
    from kervan.serve import app, watchers
    from kervan.serve.directory.actor import forget_directory

    app.delete(name)
    with contextlib.suppress(FleetError):
        find_directory(name).kill(restarts=False)
        forget_directory(name)
    if not fleet_names():
        watchers.end_all()
