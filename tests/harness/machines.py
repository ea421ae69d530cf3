"""Machines as `kervan doctor` would describe them: a healthy one with eight H200 and a fleet."""

import dataclasses
from typing import Any

from harness import hosts
from kervan.doctor.machine import FleetAnswer, Folder, HubCache, Machine, Port, Versions

GIB = 1 << 30


def versions(**changes: Any) -> Versions:
    found = Versions(
        python="3.12.4",
        ray="2.60.0",
        vllm="0.24.0",
        torch="2.11.0+cu129",
        torch_cuda="12.9",
        vllm_needs_torch="==2.11.0",
    )
    return dataclasses.replace(found, **changes)


def folder(what: str = "weights", **changes: Any) -> Folder:
    found = Folder(what=what, path=f"/data/{what}", free_bytes=500 * GIB, total_bytes=1000 * GIB)
    return dataclasses.replace(found, **changes)


def hub(**changes: Any) -> HubCache:
    return dataclasses.replace(HubCache(path="/data/hf/hub", num_models=2, token_source="HF_TOKEN"), **changes)


def machine(**changes: Any) -> Machine:
    """Everything in order, and a fleet that answers."""
    found = Machine(
        host=hosts.host(), versions=versions(), num_pci_gpus=8, nofile=(1 << 20, 1 << 20), max_processes=-1,
        folders=(folder("weights"), folder("Ray")), memory_bytes=1000 * GIB, memory_free_bytes=900 * GIB,
        ports=(Port(number=8000, holder="kervan gateway gw-1 of default (pid 7)", is_own=True),),
        ray_address="10.0.0.11:6379",
        fleet=FleetAnswer(name="default", url="http://10.0.0.11:8000", clock_ahead_s=0.4), is_clock_synchronised=True,
        hub=hub(), own_addresses=("10.0.0.11",),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)
