"""Which cloud a node is on, and the labels that Ray places by: market type and zone.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html (`instance-life-cycle`,
`placement/availability-zone`), https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
(`scheduling/preemptible`, `scheduling/provisioning-model`, `zone`),
https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service (`priority` and `zone` of `compute`).
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal

from kervan.notices import azure, gcp
from kervan.notices.aws import Imds
from kervan.notices.metadata import Metadata, SourceError
from kervan.notices.settings import NoticeSettings

Cloud = Literal["aws", "gcp", "azure"]
MarketType = Literal["spot", "on-demand"]


@dataclass(frozen=True, slots=True)
class CloudNode:
    """What a cloud says of the node that asks; None for what it does not say. `name` is the cloud's own."""

    cloud: Cloud
    name: str
    market_type: MarketType | None
    zone: str | None

    @property
    def labels(self) -> dict[str, str]:
        """Ray's own label keys, as `ray start --labels` takes them.

        Source: https://docs.ray.io/en/latest/ray-core/scheduling/labels.html
        """
        labels = {}
        if self.market_type is not None:
            labels["ray.io/market-type"] = str(self.market_type)
        if self.zone is not None:
            labels["ray.io/availability-zone"] = self.zone
        return labels


async def detect(metadata: Metadata, settings: NoticeSettings) -> CloudNode | None:
    """The cloud that answers, None where none does within `detect_timeout_s`.

    All three are asked at once, because they have one address and only one of them can be there; each is believed only
    for an answer that the others do not give.
    """
    limit_s = settings.detect_timeout_s
    nodes = await asyncio.gather(
        _within(limit_s, aws_node(metadata, url=settings.aws_url, timeout_s=limit_s)),
        _within(limit_s, gcp_node(metadata, url=settings.gcp_url, timeout_s=limit_s)),
        _within(limit_s, azure_node(metadata, url=settings.azure_url, timeout_s=limit_s)),
    )
    return next((node for node in nodes if node is not None), None)


async def _within(limit_s: float, request: Awaitable[CloudNode]) -> CloudNode | None:
    try:
        async with asyncio.timeout(limit_s):
            return await request
    except (SourceError, TimeoutError):
        return None


async def aws_node(metadata: Metadata, *, url: str, timeout_s: float) -> CloudNode:
    """The node as AWS describes it.

    Raises: SourceError where that is not AWS.
    """
    imds = Imds(metadata, url=url, timeout_s=timeout_s)
    name = await imds.get("/latest/meta-data/instance-id")
    if name is None or not name.startswith("i-"):
        raise SourceError("no EC2 instance answers")
    life_cycle, zone = await asyncio.gather(
        imds.get("/latest/meta-data/instance-life-cycle"), imds.get("/latest/meta-data/placement/availability-zone")
    )
    market: MarketType | None = None
    if life_cycle is not None:  # besides these two: scheduled, capacity-block; both are paid for and not taken back
        market = "spot" if life_cycle.strip() == "spot" else "on-demand"
    return CloudNode("aws", name.strip(), market, _single_word(zone))


async def gcp_node(metadata: Metadata, *, url: str, timeout_s: float) -> CloudNode:
    """The node as Google Cloud describes it.

    Raises: SourceError where that is not Google Cloud.
    """

    async def fetch(key: str) -> str | None:
        response = await metadata.request("GET", url + gcp.ROOT + key, headers=gcp.HEADERS, timeout_s=timeout_s)
        if response.headers.get("metadata-flavor") != "Google":
            raise SourceError("no Google metadata server answers")
        return _single_word(response.text) if response.status == 200 else None

    name, model, preemptible, zone = await asyncio.gather(
        fetch("instance/name"),
        fetch("instance/scheduling/provisioning-model"),
        fetch("instance/scheduling/preemptible"),
        fetch("instance/zone"),
    )
    if name is None:
        raise SourceError("the Google metadata server names no instance")
    market: MarketType | None = None
    if model is not None or preemptible is not None:
        market = "spot" if model == "SPOT" or preemptible == "TRUE" else "on-demand"
    return CloudNode("gcp", name, market, None if zone is None else zone.rpartition("/")[2])


async def azure_node(metadata: Metadata, *, url: str, timeout_s: float) -> CloudNode:
    """The node as Azure describes it. Its zone is `REGION-NUMBER`: a bare number says little in a cluster.

    Raises: SourceError where that is not Azure.
    """
    compute = await azure.fetch_compute(metadata, url=url, timeout_s=timeout_s)
    name, vm_id, region, number = (compute.get(key) for key in ("name", "vmId", "location", "zone"))
    if not isinstance(name, str) or not name or not isinstance(vm_id, str) or not vm_id:
        raise SourceError("no Azure VM answers")
    priority = compute.get("priority")
    market: MarketType | None = None
    if isinstance(priority, str):  # "" for a VM that was made without one; Low is the older word for Spot
        market = "spot" if priority.lower() in ("spot", "low") else "on-demand"
    zone = f"{region}-{number}" if isinstance(region, str) and isinstance(number, str) and region and number else None
    return CloudNode("azure", name, market, zone)


def _single_word(text: str | None) -> str | None:
    """`text` without space around it; None for nothing, and for what is no single word."""
    word = (text or "").strip()
    return word if word and len(word) < 256 and word.isprintable() and " " not in word else None
