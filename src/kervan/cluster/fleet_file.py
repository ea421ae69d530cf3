"""The file that `kervan up --config` reads on the cluster: the fleet's settings, less its secrets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kervan.config.fleet import SETTINGS, FleetConfig

NEVER_WRITTEN = ("api_keys",)  # they come from the environment, as KERVAN_API_KEY


def settings(fleet: FleetConfig) -> dict[str, Any]:
    """What differs from the defaults, in the order of `SETTINGS`."""
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        value = getattr(fleet, name)
        if name in NEVER_WRITTEN or value == setting.default:
            continue
        if isinstance(value, Mapping):
            value = dict(value)
        found[name] = list(value) if isinstance(value, tuple) else value
    if fleet.pools:
        found.pop("replicas", None)  # the pools say it
    return found


def for_cluster(fleet: FleetConfig, *, gpus_per_node: int, nodes: int, adds_nodes: bool = False) -> FleetConfig:
    """The fleet as it is to run on nodes of its own: reachable from other machines, and with two gateways where it can.

    `device` is fixed: the first start must not take a cluster whose GPU nodes are still on their way for one of CPUs.
    `adds_nodes`: the number of nodes follows what waits in Ray.
    """
    changes: dict[str, Any] = {}
    if fleet.host == SETTINGS["host"].default:
        changes["host"] = "0.0.0.0"
    if adds_nodes:
        changes["adds_nodes"] = True
    if not fleet.gateways and nodes > 1:
        changes["gateways"] = 2
    if not fleet.device and fleet.engine != "twin":
        changes["device"] = "GPU" if gpus_per_node else "CPU"
    return dataclasses.replace(fleet, **changes)
