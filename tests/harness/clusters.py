"""Fleets and machines that `kervan cluster render` is tried on."""

import dataclasses
from typing import Any

import yaml

from kervan.cluster.render import render
from kervan.cluster.request import LAUNCHERS, Machine, RenderRequest, Target, Zone
from kervan.config import fleet as fleets

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in Python it takes a test's second
IMAGE = "registry.example/kervan:0.1.0-gpu"
BASE = {"model": "Qwen/Qwen3-8B", "name": "chat", "tp": 2}
WITH_SPOT = {**BASE, "pools": {"on-demand": "2..4", "spot": "0..6"}}


def request(target: Target, settings: dict[str, Any] | None = None, **changes: Any) -> RenderRequest:
    """What the target can be made of, with changes."""
    can_spot = target in ("kuberay", "systemd", *LAUNCHERS)
    fleet = settings or (WITH_SPOT if can_spot else {**BASE, "replicas": 2})
    cloud = LAUNCHERS.get(target, "none")
    instance = {"aws": "p5.48xlarge", "gcp": "a3-highgpu-8g", "azure": "Standard_ND96isr_H100_v5"}.get(cloud, "")
    zones = {
        "aws": (Zone("us-west-2a", "subnet-0a"), Zone("us-west-2b", "subnet-0b")),
        "gcp": (Zone("us-central1-a"),),
        "azure": (Zone("1"), Zone("2")),
    }.get(cloud, ())
    given: dict[str, Any] = {
        "target": target,
        "fleet": fleets.from_mapping(fleet, "test"),
        "machine": Machine(instance=instance, gpus=8 if can_spot else 4, cpus=64, memory_gib=512),
        "image": "" if target in ("slurm", "systemd") else IMAGE,
        "cloud_name": cloud,
        "region": {"aws": "us-west-2", "gcp": "us-central1", "azure": "westus2"}.get(cloud, ""),
        "zones": zones,
        "project": "my-project-123" if cloud == "gcp" else "",
    }
    return RenderRequest(**{**given, **changes})


def files(target: Target, settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, str]:
    """The files of that request."""
    return dict(render(request(target, settings, **changes)).files)


def changed_fleet(made: RenderRequest, **settings: Any) -> RenderRequest:
    """The request with another fleet."""
    return dataclasses.replace(made, fleet=dataclasses.replace(made.fleet, **settings))
