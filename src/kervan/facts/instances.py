"""Cloud machines with GPUs: how many GPUs one has, and how fast the network between two of them is."""

import difflib
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.facts import hardware


@dataclass(frozen=True, slots=True)
class Instance:
    """`network_gbit_s`: of the network for GPUs (EFA, InfiniBand, GPUDirect), of a whole machine, per direction.

    `is_checked`: the number was read again at `source` (or at a copy of it) on 2026-11-25.
    """

    provider: str
    name: str
    gpu: str
    num_gpus: int
    network_gbit_s: float
    source: str
    is_checked: bool = True

    @property
    def network_bytes_s(self) -> float:
        """`network_gbit_s` in bytes per second: of a whole machine, per direction."""
        return self.network_gbit_s * 1e9 / 8


_AWS_EFA = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-acc-inst-types.html"
_AWS = "https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html"
_GCP = "https://docs.cloud.google.com/compute/docs/gpus/gpu-network-bandwidth"
_AZURE = "https://learn.microsoft.com/en-us/azure/virtual-machines/sizes/gpu-accelerated/"

INSTANCES: dict[str, Instance] = {
    instance.name: instance
    for instance in (
        Instance("AWS", "g5.48xlarge", "A10G", 8, 100, _AWS),
        Instance("AWS", "g6.48xlarge", "L4", 8, 100, _AWS, is_checked=False),
        Instance("AWS", "g6e.48xlarge", "L40S", 8, 400, _AWS_EFA),
        Instance("AWS", "p4d.24xlarge", "A100-40", 8, 400, _AWS),
        Instance("AWS", "p4de.24xlarge", "A100", 8, 400, _AWS, is_checked=False),
        Instance("AWS", "p5.48xlarge", "H100", 8, 3200, _AWS_EFA),
        Instance("AWS", "p5e.48xlarge", "H200", 8, 3200, _AWS_EFA),
        Instance("AWS", "p5en.48xlarge", "H200", 8, 3200, _AWS, is_checked=False),
        Instance("AWS", "p6-b200.48xlarge", "B200", 8, 3200, _AWS, is_checked=False),
        Instance("AWS", "p6-b300.48xlarge", "B300", 8, 6400, _AWS, is_checked=False),
        Instance("Google Cloud", "g2-standard-96", "L4", 8, 100, _GCP),
        Instance("Google Cloud", "a2-highgpu-8g", "A100-40", 8, 100, _GCP),
        Instance("Google Cloud", "a2-ultragpu-8g", "A100", 8, 100, _GCP),
        Instance("Google Cloud", "a3-highgpu-8g", "H100", 8, 800, _GCP, is_checked=False),
        Instance("Google Cloud", "a3-ultragpu-8g", "H200", 8, 3200, _GCP),
        Instance("Google Cloud", "a4-highgpu-8g", "B200", 8, 3200, _GCP),
        Instance("Google Cloud", "a4x-highgpu-4g", "GB200", 4, 1600, _GCP),
        Instance("Azure", "Standard_ND96asr_v4", "A100-40", 8, 1600, _AZURE + "nda100v4-series"),
        Instance("Azure", "Standard_ND96amsr_A100_v4", "A100", 8, 1600, _AZURE + "ndma100v4-series", is_checked=False),
        Instance("Azure", "Standard_ND96isr_H100_v5", "H100", 8, 3200, _AZURE + "ndh100v5-series"),
        Instance("Azure", "Standard_ND96isr_H200_v5", "H200", 8, 3200, _AZURE + "nd-h200-v5-series", is_checked=False),
        Instance("Azure", "Standard_ND96isr_MI300X_v5", "MI300X", 8, 3200, _AZURE + "nd-mi300x-v5-series"),
        Instance(
            "Azure", "Standard_NC80adis_H100_v5", "H100-NVL", 2, 80, _AZURE + "ncadsh100v5-series", is_checked=False
        ),
    )
}


def instance(name: str) -> Instance:
    """The machine of this name, in any case.

    Raises: ConfigError for a name that is not in the table.
    """
    by_name = {key.lower(): value for key, value in INSTANCES.items()}
    machine = by_name.get(name.strip().lower())
    if machine is None:
        near = difflib.get_close_matches(name.lower(), by_name, n=1)
        hint = f"did you mean {by_name[near[0]].name}? " if near else ""
        raise ConfigError(f"no instance {name!r} is known; {hint}known: {', '.join(INSTANCES)}")
    return machine


def with_gpu(gpu: str) -> tuple[Instance, ...]:
    """The machines that have this GPU, the fastest network first.

    Raises: ConfigError for a GPU that is not in the table of GPUs.
    """
    name = hardware.gpu(gpu).name
    machines = (instance for instance in INSTANCES.values() if instance.gpu == name)
    return tuple(sorted(machines, key=lambda instance: -instance.network_gbit_s))
