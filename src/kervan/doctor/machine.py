"""What is known of this machine, as plain values; nothing is concluded here.

Gathered by `gather`, judged by `checks`. None, or an empty value, means that it is not known here.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kervan.comm.facts import HostFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Of what is installed; empty for what is not. `torch_cuda`: that torch was built for, empty for a CPU build.

    `vllm_needs_torch`: as pip says it, such as `==2.11.0`. `python_needs`: package -> the range of Python versions
    that it asks for.
    """

    python: str
    ray: str = ""
    vllm: str = ""
    torch: str = ""
    torch_cuda: str = ""
    vllm_needs_torch: str = ""
    python_needs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A directory that fleets write to. `path`: itself, or what is there of the way to it."""

    what: str
    path: str
    free_bytes: int
    total_bytes: int
    is_writable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port that a fleet would listen on. `holder`: who does, as `name (pid 12)`; empty if it is free.

    `is_own`: the holder is a gateway of the fleet that was looked for.
    """

    number: int
    holder: str = ""
    is_own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAnswer:
    """A fleet that was started from this machine. `problem`: why it does not answer, or is not ready.

    `clock_ahead_s`: of the gateway's clock, in whole seconds.
    """

    name: str
    url: str
    problem: str = ""
    clock_ahead_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCache:
    """Hugging Face's cache. `token_source`: a variable or a file; `token_problem`: what is wrong with the token.

    `offline`: the variable that forbids to ask the hub. `num_models`: that are in the cache.
    """

    path: str
    is_writable: bool = True
    num_models: int = 0
    token_source: str = ""
    token_problem: str = ""
    offline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine. `host`: of its GPUs, network and NCCL settings, as `kervan comm doctor` knows it.

    `num_pci_gpus`: NVIDIA's on the PCI bus, whatever the driver says. `ray_address`: that a fleet would be on, empty if
    Ray would be started here; `ray_problem`: why it does not answer. `home_problem`: why kervan cannot remember fleets.
    `is_clock_synchronised`: by the kernel. `starvation`: of `kervan.autogroups`. `proxy`: `VARIABLE=value`;
    `no_proxy`: hosts that go without it. `memory_bytes`: that this process may use, `memory_free_bytes` of it now.
    """

    host: HostFacts
    versions: Versions
    num_pci_gpus: int = 0
    nofile: tuple[int, int] = (0, 0)  # soft and hard limit; -1: none
    max_processes: int = -1
    folders: tuple[Folder, ...] = ()
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    ports: tuple[Port, ...] = ()
    ray_address: str = ""
    ray_problem: str = ""
    fleet: FleetAnswer | None = None
    home_problem: str = ""
    is_clock_synchronised: bool | None = None
    starvation: str = ""
    hub: HubCache | None = None
    proxy: str = ""
    no_proxy: tuple[str, ...] = ()
    own_addresses: tuple[str, ...] = ()


def to_json(machine: Machine) -> Any:
    """As plain values."""
    return msgspec.to_builtins(machine)
