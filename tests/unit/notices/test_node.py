import asyncio
import os
import re
import signal

import pytest
from harness.clouds import Gcp, serving
from harness.places import DOCS

from kervan.notices.events import Notice
from kervan.notices.node import watching
from kervan.notices.settings import PREFIX, NoticeSettings

PAGE = DOCS / "notices.md"


async def test_a_node_hears_its_cloud_its_operator_and_sigterm() -> None:
    cloud = Gcp(**{"instance/scheduling/preemptible": "TRUE", "instance/zone": "projects/1/zones/us-east1-b"})
    heard: asyncio.Queue[Notice] = asyncio.Queue()
    before = signal.getsignal(signal.SIGTERM)
    async with serving(cloud) as server:
        urls = dict.fromkeys(("aws_url", "gcp_url", "azure_url"), server.url)
        settings = NoticeSettings(watch=("auto", "signal"), gcp_period_s=0.01, **urls)  # type: ignore[arg-type]
        async with asyncio.timeout(10), watching(settings, heard.put, node="n1") as watch:
            assert watch.cloud_node is not None
            assert watch.cloud_node.labels == {"ray.io/market-type": "spot", "ray.io/availability-zone": "us-east1-b"}
            watch.operator.announce(remaining_s=300)
            assert (await heard.get()).kind == "operator"
            cloud.set("instance/preempted", "TRUE")
            assert (await heard.get()).kind == "preemption"
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await heard.get()).kind == "sigterm"
            soonest = watch.watcher.soonest
            assert soonest is not None
            assert soonest.kind == "sigterm"  # 25 s; the preemption has 30 s, the operator 300 s
    assert signal.getsignal(signal.SIGTERM) is before


async def test_with_nothing_to_watch_only_operators_are_heard() -> None:
    heard: asyncio.Queue[Notice] = asyncio.Queue()
    async with asyncio.timeout(10), watching(NoticeSettings(watch=()), heard.put, node="n1") as watch:
        assert (list(watch.watcher.health), watch.cloud_node) == (["operator"], None)
        told = watch.operator.announce()
        assert await heard.get() == told
        assert not await watch.watcher.acknowledge(told)


def test_the_page_lists_all_settings_with_their_defaults() -> None:
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| ([^|]*) \|", PAGE.read_text(), re.M)
    described = {name.removeprefix(PREFIX).lower(): default.strip("` ") for name, default in rows}
    defaults = {name: getattr(NoticeSettings(), name) for name in NoticeSettings.__dataclass_fields__}
    assert described.keys() == defaults.keys()
    for name, value in defaults.items():
        if isinstance(value, tuple):
            assert described[name] == ",".join(value)
        elif value:
            assert described[name] == (f"{value:g}" if isinstance(value, float) else value)


@pytest.mark.parametrize("word", ["preemption", "rebalance", "maintenance", "pause", "sigterm", "operator"])
def test_the_page_explains_all_kinds(word: str) -> None:
    assert f"`{word}`" in PAGE.read_text()
