"""What Serve's controller asks when it scales: gateways by their load, replicas as the scaler wants them.

The functions run in the controller's loop, which does nothing else meanwhile: they read what a thread has brought, and
raise nothing, since a policy that does stops its application, and all after it, from being updated (Ray 2.60).
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from ray.serve.config import AutoscalingContext

from kervan.config.fleet import FleetConfig
from kervan.policy import gateway_count
from kervan.serve import ray_internals
from kervan.serve.scaler import wanted
from kervan.serve.scaler.wanted import Wanted

logger = logging.getLogger(__name__)

APP_PREFIX = "kervan-"  # of a fleet's application in Serve
BUSY = "busy"  # a gateway's metric: the share of the time in which its loop ran, or waited for a core
READ_PERIOD_S = 0.25
FORGET_S = 60.0  # after Serve has asked of a fleet for the last time


def gateways(config: FleetConfig) -> dict[str, Any]:
    """Serve's autoscaling of a fleet's gateways.

    A fixed number has it too, with that number as both bounds: a Serve replica that starts without it does not begin
    to report when it comes (Ray 2.60), and gateways are not replaced for that.
    """
    return {
        "min_replicas": config.gateways,
        "initial_replicas": config.gateways,
        "max_replicas": config.max_gateways or config.gateways,
        "look_back_period_s": 20.0,  # two reports of each gateway; Serve collects them every 10 s
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
        "policy": {"policy_function": f"{__name__}:count_gateways"},
    }


def count_gateways(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Called by Serve's controller. It bounds the result and waits before it acts."""
    busy = (context.aggregated_metrics or {}).get(BUSY, {})
    decision = gateway_count.decide(
        [busy[replica_id] for replica_id in context.running_replicas if replica_id in busy],
        context.target_num_replicas,
        context.capacity_adjusted_min_replicas,
        context.capacity_adjusted_max_replicas,
    )
    return decision.count, {"reason": decision.reason}


def pool(config: FleetConfig, name: str) -> dict[str, Any]:
    """Serve's autoscaling of one of a fleet's pools. What to wait for is the scaler's to know, so Serve waits for none.

    Without `initial_replicas`, a change of other settings leaves the number as it is. A pool with a choice may always
    go to none, as far as Serve is concerned: what it cannot place would hold up changes of the rest.
    """
    bounds = config.bounds[name]
    return {
        "min_replicas": bounds.minimum if bounds.minimum == bounds.maximum else 0,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": f"{__name__}:count_replicas"},
    }


def count_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many as the scaler wants; as many as there are to be while it has said nothing."""
    ray_internals.let_choose_who_stops(leaving)
    found = _news.of(context.app_name)
    targets = {} if found is None else found.targets
    return targets.get(context.deployment_name, context.target_num_replicas), {}


def leaving(app_name: str) -> Sequence[str]:
    """Serve's ids of the replicas of an application, those first that are to go first."""
    found = _news.of(app_name)
    return () if found is None else found.leaving


class _News:
    """What the scalers of all fleets want, as a thread reads it; what was read last stays when reading fails."""

    def __init__(self) -> None:
        self._asked_s: dict[str, float] = {}
        self._wanted: dict[str, Wanted | None] = {}
        self._thread: threading.Thread | None = None

    def of(self, app_name: str) -> Wanted | None:
        self._asked_s[app_name] = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read_forever, daemon=True, name="wanted")
            self._thread.start()
        return self._wanted.get(app_name)

    def _read_forever(self) -> None:
        while True:
            for app_name, asked_s in list(self._asked_s.items()):
                if time.monotonic() - asked_s > FORGET_S:
                    self._asked_s.pop(app_name, None)
                    self._wanted.pop(app_name, None)
                    continue
                try:
                    found = wanted.published(app_name.removeprefix(APP_PREFIX))
                except Exception as error:  # noqa: BLE001 - the store is away, or has what another version wrote
                    logger.warning("what fleet %s wants cannot be read: %s", app_name, error)
                else:
                    self._wanted[app_name] = found or self._wanted.get(app_name)
            time.sleep(READ_PERIOD_S)


_news = _News()
