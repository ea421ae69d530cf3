import pytest
from harness.clouds import Answer, Asked, Aws, Azure, Gcp, forever, serving

from kervan.notices.detect import CloudNode, detect
from kervan.notices.metadata import Metadata
from kervan.notices.node import watched_sources
from kervan.notices.settings import NoticeSettings


def settings(url: str, **fields: object) -> NoticeSettings:
    values: dict[str, object] = {"aws_url": url, "gcp_url": url, "azure_url": url, "detect_timeout_s": 10.0, **fields}
    return NoticeSettings(**values)  # type: ignore[arg-type]


def aws(life_cycle: str | None) -> Aws:
    cloud = Aws(**{"placement/availability-zone": "us-west-2a"})
    if life_cycle is not None:
        cloud.items["instance-life-cycle"] = life_cycle
    return cloud


def gcp(**scheduling: str) -> Gcp:
    keys = {f"instance/scheduling/{name}": value for name, value in scheduling.items()}
    return Gcp(**{"instance/zone": "projects/123456/zones/us-central1-a", **keys})


@pytest.mark.parametrize(
    ("cloud", "found"),
    [
        (aws("spot"), CloudNode("aws", "i-0123456789abcdef0", "spot", "us-west-2a")),
        (aws("on-demand"), CloudNode("aws", "i-0123456789abcdef0", "on-demand", "us-west-2a")),
        (aws("capacity-block"), CloudNode("aws", "i-0123456789abcdef0", "on-demand", "us-west-2a")),
        (aws(None), CloudNode("aws", "i-0123456789abcdef0", None, "us-west-2a")),
        (gcp(**{"provisioning-model": "SPOT"}), CloudNode("gcp", "node-1", "spot", "us-central1-a")),
        (gcp(preemptible="TRUE"), CloudNode("gcp", "node-1", "spot", "us-central1-a")),
        (gcp(preemptible="FALSE"), CloudNode("gcp", "node-1", "on-demand", "us-central1-a")),
        (gcp(), CloudNode("gcp", "node-1", None, "us-central1-a")),
        (Azure(priority="Spot", zone="2"), CloudNode("azure", "vm_0", "spot", "westeurope-2")),
        (Azure(priority="Regular", zone=""), CloudNode("azure", "vm_0", "on-demand", None)),
        (Azure(priority=""), CloudNode("azure", "vm_0", "on-demand", None)),
    ],
    ids=lambda value: f"{value.cloud} {value.market_type}" if isinstance(value, CloudNode) else "",
)
async def test_a_node_finds_its_cloud(cloud: Aws | Gcp | Azure, found: CloudNode) -> None:
    async with serving(cloud) as server, Metadata() as metadata:
        assert await detect(metadata, settings(server.url)) == found


def test_labels_are_rays_own() -> None:
    assert CloudNode("aws", "i-1", "spot", "us-west-2a").labels == {
        "ray.io/market-type": "spot",
        "ray.io/availability-zone": "us-west-2a",
    }
    assert CloudNode("aws", "i-1", None, None).labels == {}


class AnswersAll:
    """A captive portal, or a web server that has the address by chance."""

    async def answer(self, asked: Asked) -> Answer:
        return Answer(200, "<html>TRUE</html>")


class AnswersNothing:
    async def answer(self, asked: Asked) -> Answer:
        await forever()
        raise AssertionError("not reached")


@pytest.mark.parametrize("cloud", [AnswersAll(), AnswersNothing()], ids=["a web page", "silence"])
async def test_other_machines_are_no_cloud(cloud: AnswersAll | AnswersNothing) -> None:
    async with serving(cloud) as server, Metadata() as metadata:
        assert await detect(metadata, settings(server.url, detect_timeout_s=0.2)) is None


async def test_nobody_there_is_no_cloud() -> None:
    async with serving(Aws()) as server:
        url = server.url
    async with Metadata() as metadata:
        assert await detect(metadata, settings(url)) is None


async def test_auto_watches_the_cloud_it_finds() -> None:
    async with serving(gcp()) as server, Metadata() as metadata:
        found, sources = await watched_sources(metadata, settings(server.url, watch=("auto", "signal")), node="n1")
    assert found is not None
    assert [source.name for source in sources] == ["gcp preempted", "gcp maintenance-event"]


async def test_named_clouds_are_watched_without_asking() -> None:
    async with Metadata() as metadata:
        found, sources = await watched_sources(metadata, NoticeSettings(watch=("azure", "aws")), node="n1")
        assert (found, [source.name for source in sources]) == (None, ["azure", "aws"])
        assert await watched_sources(metadata, NoticeSettings(watch=()), node="n1") == (None, [])
