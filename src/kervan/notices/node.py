"""All that one node runs: the sources that its settings name, operators, and the watcher over them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from kervan.notices import gcp
from kervan.notices.aws import AwsSource
from kervan.notices.azure import AzureSource
from kervan.notices.detect import Cloud, CloudNode, detect
from kervan.notices.gcp import GcpSource
from kervan.notices.metadata import Metadata
from kervan.notices.operator import OperatorSource
from kervan.notices.settings import NoticeSettings
from kervan.notices.signals import SigtermSource
from kervan.notices.source import NoticeSource
from kervan.notices.watcher import NoticeCallback, Watcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeWatch:
    """A watcher at work. `operator` takes commands; `cloud_node` is what "auto" found, None if it was not asked."""

    watcher: Watcher
    operator: OperatorSource
    cloud_node: CloudNode | None


@contextlib.asynccontextmanager
async def watching(
    settings: NoticeSettings,
    on_notice: NoticeCallback,
    *,
    node: str,
    on_withdrawn: NoticeCallback | None = None,
    also: Sequence[NoticeSource] = (),
) -> AsyncIterator[NodeWatch]:
    """Watch while inside; notices call the node `node`, and are told as `Watcher` says. `also`: sources of the caller.

    Raises: ConfigError for "signal" outside of the main thread.
    """
    async with contextlib.AsyncExitStack() as stack:
        metadata = await stack.enter_async_context(Metadata())
        cloud_node, sources = await watched_sources(metadata, settings, node=node)
        operator = OperatorSource(node=node)
        sources += [operator, *also]
        if "signal" in settings.watch:
            sigterm = SigtermSource(node=node, lead_s=settings.sigterm_lead_s)
            stack.enter_context(sigterm.installed())
            sources.append(sigterm)
        watcher = Watcher(sources, on_notice, on_withdrawn=on_withdrawn)
        running = asyncio.create_task(watcher.run())
        try:
            yield NodeWatch(watcher, operator, cloud_node)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def cloud_sources(cloud: Cloud, metadata: Metadata, settings: NoticeSettings, *, node: str) -> list[NoticeSource]:
    """The sources of one cloud; their notices call the node `node`."""
    if cloud == "aws":
        return [AwsSource(metadata, url=settings.aws_url, node=node, period_s=settings.aws_period_s)]
    if cloud == "azure":
        return [
            AzureSource(
                metadata,
                url=settings.azure_url,
                node=node,
                vm_name=settings.azure_vm_name,
                period_s=settings.azure_period_s,
            )
        ]
    leads: tuple[tuple[gcp.Key, float], ...] = (
        ("instance/preempted", settings.gcp_lead_s),
        ("instance/maintenance-event", gcp.MAINTENANCE_LEAD_S),
    )
    return [
        GcpSource(
            metadata,
            key=key,
            url=settings.gcp_url,
            node=node,
            lead_s=lead_s,
            wait_s=settings.gcp_wait_s,
            period_s=settings.gcp_period_s,
        )
        for key, lead_s in leads
    ]


async def watched_sources(
    metadata: Metadata, settings: NoticeSettings, *, node: str
) -> tuple[CloudNode | None, list[NoticeSource]]:
    """What `settings.watch` names, without "signal" and operators; and the cloud that "auto" found, if any."""
    clouds: list[Cloud] = [name for name in settings.watch if name in ("aws", "gcp", "azure")]
    detected = None
    if "auto" in settings.watch:
        detected = await detect(metadata, settings)
        if detected is None:
            logger.info("notices: no cloud's metadata server answers here")
        elif detected.cloud not in clouds:
            clouds.append(detected.cloud)
    return detected, [source for cloud in clouds for source in cloud_sources(cloud, metadata, settings, node=node)]
