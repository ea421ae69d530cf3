"""What is to be rendered: a fleet, the machines that it is to run on, and what the target needs to know of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kervan.cluster import grace, nodes
from kervan.cluster.clouds import CLOUDS, Cloud, CloudName
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.units import shortened

Target = Literal["kuberay", "ray-aws", "ray-gcp", "ray-azure", "slurm", "compose", "systemd"]
TARGETS: tuple[Target, ...] = get_args(Target)
LAUNCHERS: Mapping[str, CloudName] = {"ray-aws": "aws", "ray-gcp": "gcp", "ray-azure": "azure"}
EXTRAS = ("servicemonitor", "dcgm")
NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
SUBNET = re.compile(r"subnet-[0-9a-f]+")
REGION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PARTITION = re.compile(r"[A-Za-z0-9_.-]+(,[A-Za-z0-9_.-]+)*")
# Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
LABEL_PREFIX = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
IMAGE = re.compile(
    r"(?P<name>[a-z0-9]+([.:_/-]+[a-z0-9]+)*?)(:(?P<tag>[\w][\w.-]{0,127}))?(@sha256:(?P<digest>[0-9a-f]{64}))?"
)
MINUTES_PER_DAY = 24 * 60


@dataclass(frozen=True, slots=True)
class Zone:
    """A zone of the region, and the subnet of it that nodes join (AWS)."""

    name: str
    subnet: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node: its cloud's name for it, GPUs, CPU cores, and memory in GiB, less what the system needs."""

    instance: str = ""
    gpus: int = 1
    cpus: int = 8
    memory_gib: int = 64


def check_namespace(text: str) -> None:
    """Raises: ConfigError for what Kubernetes takes for no name of a namespace."""
    if NAMESPACE.fullmatch(text) is None:
        raise ConfigError(
            f"--namespace {text!r} is no name of a namespace; use 1 to 63 lower-case letters, digits and "
            "hyphens, such as llm"
        )


def check_label(key: str, value: str) -> None:
    """Raises: ConfigError for what Kubernetes takes for no label of an object."""
    prefix, slash, name = key.rpartition("/")
    if LABEL_VALUE.fullmatch(name) is None or (slash and LABEL_PREFIX.fullmatch(prefix) is None):
        raise ConfigError(
            f"--label {shortened(key)!r} is no key of a label; use up to 63 letters, digits and - _ . between two of "
            "them, like --label release=prometheus"
        )
    if value and LABEL_VALUE.fullmatch(value) is None:
        raise ConfigError(
            f"--label {key}={shortened(value)!r} has no value of a label; use up to 63 letters, digits and - _ . "
            f"between two of them, like --label {key}=prometheus"
        )


def check_partition(text: str) -> None:
    """Raises: ConfigError for what is no name of a partition of Slurm, or several joined by commas."""
    if PARTITION.fullmatch(text) is None:
        raise ConfigError(
            f"--partition {shortened(text)!r} is no name of a partition; use letters, digits and - _ . (several "
            "joined by commas), such as gpu"
        )


def check_region(text: str) -> None:
    """Raises: ConfigError for what no cloud calls a region."""
    if REGION.fullmatch(text) is None:
        raise ConfigError(
            f"--region {shortened(text)!r} is no name of a region; use lower-case letters, digits and hyphens, such as "
            "us-west-2"
        )


def check_zones(zones: Sequence[Zone]) -> None:
    """Raises: ConfigError for what no cloud and no cluster calls a zone, and for one that is there twice."""
    names = [zone.name for zone in zones]
    for zone in zones:
        if LABEL_VALUE.fullmatch(zone.name) is None:
            raise ConfigError(
                f"--zone {shortened(zone.name)!r} is no name of a zone; use letters, digits and hyphens, such as "
                "us-west-2a"
            )
        if zone.subnet and SUBNET.fullmatch(zone.subnet) is None:
            raise ConfigError(
                f"--zone {zone.name}={shortened(zone.subnet)!r} is no subnet of AWS; write "
                f"--zone {zone.name}=subnet-0123456789abcdef0"
            )
        if names.count(zone.name) > 1:
            raise ConfigError(f"--zone {zone.name} is given {names.count(zone.name)} times; give it once")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """A fleet on machines. `image`: of the container, with an exact tag or digest; empty for targets without one.

    `extras`: of `EXTRAS`. `time_limit_min`: of a Slurm job.

    Raises: ConfigError for what the target cannot be made from.
    """

    target: Target
    fleet: FleetConfig
    machine: Machine
    image: str = ""
    cloud_name: CloudName = "none"
    region: str = ""
    zones: tuple[Zone, ...] = ()
    project: str = ""
    namespace: str = "default"
    extras: frozenset[str] = frozenset()
    partition: str = ""
    time_limit_min: int = MINUTES_PER_DAY

    def __post_init__(self) -> None:
        if self.target in ("kuberay", "compose", *LAUNCHERS):
            check_image(self.image)
        check_namespace(self.namespace)
        if self.partition:
            check_partition(self.partition)
        if self.region:
            check_region(self.region)
        check_zones(self.zones)
        if len(self.fleet.api_keys) > 1:
            raise ConfigError(
                f"the fleet has {len(self.fleet.api_keys)} api_keys, and what is rendered takes one, as "
                "KERVAN_API_KEY; leave them out of the file, and add the others with kervan up --api-key"
            )
        nodes.groups(self.fleet, self.machine.gpus)

    @property
    def name(self) -> str:
        """Of the fleet, and of all that is made for it."""
        return self.fleet.name

    @property
    def cloud(self) -> Cloud:
        """The cloud whose spot nodes are meant."""
        return CLOUDS[self.cloud_name]

    @property
    def groups(self) -> tuple[nodes.NodeGroup, ...]:
        """The nodes of each market."""
        return nodes.groups(self.fleet, self.machine.gpus)

    @property
    def most_nodes(self) -> int:
        """Of all markets."""
        return sum(group.most for group in self.groups)

    @property
    def is_scaled(self) -> bool:
        """Whether nodes are added and removed as replicas need them."""
        return any(group.least != group.most for group in self.groups)

    def grace(self, market: str) -> grace.Grace:
        """How long the end of a node of this market may take."""
        return grace.of(market, self.fleet.drain_timeout_s, self.cloud)


def check_image(image: str) -> None:
    """Raises: ConfigError for what is no image, and for one whose contents may change under its name."""
    match = IMAGE.fullmatch(image)
    example = "write for example --image registry.example/kervan:0.1.0-gpu"
    if not image:
        raise ConfigError(f"there is no image; build one from deploy/gpu.Dockerfile, and {example}")
    if match is None:
        raise ConfigError(f"--image {image!r} is not in the form NAME:TAG or NAME@sha256:DIGEST; {example}")
    if match["digest"] is None and match["tag"] in (None, "latest"):
        raise ConfigError(f"--image {image!r} names no version: nodes that join later could run another one; {example}")
