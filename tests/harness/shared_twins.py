"""Simulated replicas that tests share: a fleet, and gateways without Ray; for all that needs no model."""

import asyncio
import contextlib
import json
from collections.abc import Iterator

import httpx
import pytest

from harness.gateway_trio import GatewayTrio
from harness.groups import until_group_ends
from harness.live import START_S, Fleet, Home, eventually
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, Load, kervan, streams_of
from kervan.twin.token_engine import answer

STALL_S = 10.0
NAMED = ("max_model_len=2048", "served_model_name=twin")
SETTINGS = {
    "engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}, "stall_timeout_s": STALL_S, "replay_s": 60,
    "log_format": "json",
}  # fmt: skip


@pytest.fixture(scope="session")
def twins(request: pytest.FixtureRequest, home: Home, models: Models) -> Fleet:
    """Three twins and one gateway, named "twins"; a test that changes their number sets it back."""
    return until_group_ends(request.config, _twins(home, models))


@pytest.fixture(scope="session")
def trio(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> GatewayTrio:
    """Three gateways with vLLM's app over a twin."""
    running = GatewayTrio(models.demo, tmp_path_factory.mktemp("trio"))
    return until_group_ends(request.config, contextlib.closing(running))


@contextlib.contextmanager
def _twins(home: Home, models: Models) -> Iterator[Fleet]:
    config = home.scratch / "twins.yaml"
    config.write_text(json.dumps(SETTINGS))
    options = ("--config", str(config), "--replicas", "3", "--gateways", "1")
    running = home.up(models.demo, "twins", NAMED, *options)
    yield running
    asyncio.run(a_graceful_end(running, models))


async def a_graceful_end(fleet: Fleet, models: Models) -> None:
    """The last stream ends whole, and then the fleet is gone."""
    last = Load(fleet.url, models.demo)
    async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S) as client:
        stream = asyncio.create_task(last.stream(client, [7], 100))  # 10 s
        await asyncio.to_thread(eventually, lambda: sum(streams_of(fleet).values()) == 1, "it is placed", START_S)
        told = await kervan(fleet, "down", "--graceful")
        assert await stream == (answer([7], 100, last.limits), "length")
    assert told.startswith(f"{fleet.name}: stopped")
