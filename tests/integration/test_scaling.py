"""Replicas follow the load: real Ray and real gateways, simulated engines; every token of every stream is checked."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness.live import START_S, Fleet, Home, eventually, eventually_async, stopped
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, kervan, kill_actor, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

MOST = 3
# By ongoing requests: what these tests are about is how decisions are carried out, so they are to be foreseen.
SETTINGS: dict[str, Any] = {
    "engine": "twin",
    "gpu": "H200",
    "twin": {"base_s": STEP_S},
    "policy": "ray",
    "autoscaling": {
        "target_ongoing_requests": 6,
        "upscale_delay_s": 0,
        "downscale_delay_s": 2,
        "downscale_to_zero_delay_s": 2,
        "look_back_period_s": 2,
        "metrics_interval_s": 1,
    },
    "max_queued_streams": 2,
}


@pytest.fixture(scope="module")
def scaled(home: Home, models: Models, scratch: Path) -> Iterator[Fleet]:
    """One to three twins, six streams each, and one gateway."""
    config = scratch / "scaled.yaml"
    config.write_text(json.dumps(SETTINGS))
    name = ("max_model_len=2048", "served_model_name=twin", "max_num_seqs=16")
    words = ("--config", str(config), "--replicas", f"1..{MOST}", "--gateways", "1")
    running = home.up(models.demo, "scaled", name, *words)
    yield running
    assert home.kervan("down", "--name", "scaled").returncode == 0


def page(fleet: Fleet) -> dict[str, Any]:
    """What the gateway tells: sooner than a command."""
    told: dict[str, Any] = fleet.get("/kervan/status").json()
    return told


def linked(fleet: Fleet) -> set[str]:
    """Replicas that the gateway may send to."""
    return set(page(fleet)["replicas"])


def scaling(fleet: Fleet) -> dict[str, Any]:
    told: dict[str, Any] = page(fleet)["directory"]["scaling"]
    return told


def target(fleet: Fleet) -> int:
    return sum(scaling(fleet)["targets"].values())


async def until_small(fleet: Fleet, count: int = 1) -> None:
    await eventually_async(lambda: len(linked(fleet)) == count == target(fleet), f"{count} replicas", START_S)


async def test_a_load_makes_it_grow_and_its_end_makes_it_shrink(scaled: Fleet, models: Models) -> None:
    await until_small(scaled)
    (oldest,) = linked(scaled)
    async with load(scaled, models):
        await eventually_async(lambda: len(linked(scaled)) == MOST, "all replicas work", START_S)
        assert oldest in linked(scaled)
        told = await kervan(scaled, "status", "--why")
        assert "autoscaling (ray): on-demand 3: " in told
        assert f"-> {MOST}: " in told
        status = scaled.status()
        assert status["target_replicas"] == status["pools"]["on-demand"]["target"] == MOST
        assert status["autoscaling"]["decisions"][-1]["targets"] == {"on-demand": MOST}
        assert scaled.total("kervan_replicas_target") == MOST
        assert "autoscaling (ray): on-demand 3" in await kervan(scaled, "top", "--once")
        lines = (await kervan(scaled, "autoscale", "--dry-run", "--duration", "1s")).splitlines()
        assert " ray: on-demand 3: " in lines[-1]
        dry = json.loads(
            await kervan(scaled, "autoscale", "--dry-run", "--policy", "slo", "--duration", "1s", "--json")
        )
        assert (dry["policy"], dry["decisions"][-1]["now"]) == ("slo", {"on-demand": MOST})
    await until_small(scaled)
    assert scaled.total("kervan_streams_broken_total") == 0


async def test_other_settings_leave_the_number_and_a_plain_one_fixes_it(scaled: Fleet, models: Models) -> None:
    async with load(scaled, models):
        await eventually_async(lambda: len(linked(scaled)) == MOST, "all replicas work", START_S)
        before = linked(scaled)
        await kervan(scaled, "up", "--schedule", "mon 03:00-03:01 min=2")
        assert linked(scaled) == before
        await kervan(scaled, "scale", "2")
        await eventually_async(lambda: len(linked(scaled)) == 2 == target(scaled), "two, and no other", START_S)
        assert linked(scaled) < before
        assert scaling(scaled)["policy"] == "fixed"
        await kervan(scaled, "scale", f"1..{MOST}")
        await eventually_async(lambda: len(linked(scaled)) == MOST, "the load is followed again", START_S)
    await until_small(scaled)


async def test_a_burst_that_no_start_can_meet_waits_or_is_told_to_come_again(scaled: Fleet) -> None:
    """16 run at once on the one replica and 2 wait; of 60 some are refused with a time, and these succeed later."""
    await until_small(scaled)
    body = {"model": "twin", "prompt": [30] * 8, "max_tokens": 40, "ignore_eos": True}
    refused: list[int] = []

    async def ask(client: httpx.AsyncClient) -> None:
        while True:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == 40
                return
            assert answer.status_code == 503, answer.text
            refused.append(int(answer.headers["retry-after"]))
            await asyncio.sleep(min(refused[-1], 1.0))

    async with httpx.AsyncClient(base_url=scaled.url, timeout=START_S) as client:
        await asyncio.gather(*(ask(client) for _ in range(60)))
    assert refused and min(refused) >= 1
    assert any(entry["targets"]["on-demand"] > 1 for entry in scaling(scaled)["history"])
    await until_small(scaled)


async def test_silent_gateways_change_no_number_and_that_is_told(scaled: Fleet, models: Models) -> None:
    """Their actor goes on beating for a process that is stopped with its last news, and then there are none."""
    await until_small(scaled)
    (pid,) = scaled.gateway_pids().values()
    with stopped(pid):
        what = "no gateway has told anything for"
        told = await eventually_async(
            lambda: (said := scaled.home.kervan("status", "--why", "--name", "scaled").stdout) and what in said and said,
            what, 60,
        )  # fmt: skip
        assert "the numbers stay" in told

    def is_there_again() -> bool:
        return any(gateway["ready"] and gateway["pid"] != pid for gateway in scaled.status()["gateways"])

    await eventually_async(is_there_again, "another gateway", START_S)
    await asyncio.to_thread(scaled.wait_until_whole, 1, 1)


async def test_the_directory_and_the_controller_go_and_the_number_stays(scaled: Fleet, models: Models) -> None:
    async with load(scaled, models) as running:
        await eventually_async(lambda: len(linked(scaled)) == MOST, "all replicas work", START_S)
        before, history = linked(scaled), scaling(scaled)["history"]
        await asyncio.to_thread(kill_actor, scaled, "directory-scaled", "kervan")
        await eventually_async(lambda: (scaling(scaled) or {}).get("history") == history, "it remembers", START_S)
        await asyncio.to_thread(kill_actor, scaled, "SERVE_CONTROLLER_ACTOR", "serve")
        num_whole = running.num_whole
        await eventually_async(lambda: running.num_whole > num_whole + 32, "streams go on", START_S)
        assert (linked(scaled), target(scaled)) == (before, MOST)
    await until_small(scaled)


def test_wrong_bounds_are_refused(scaled: Fleet) -> None:
    for words, told in (("3..1", "'3..1' goes from 3 down to 1"), ("0..0", "'0..0'"), ("0", "at least 1")):
        done = scaled.home.kervan("scale", words, "--name", "scaled")
        assert done.returncode == 2 and told in done.stderr, done.stderr


async def test_no_replica_while_nobody_asks_and_one_for_the_first_request(scaled: Fleet) -> None:
    await kervan(scaled, "scale", f"0..{MOST}")
    await until_small(scaled, 0)
    assert scaled.get("/health/ready").status_code == 200
    body = {"model": "twin", "prompt": [30] * 8, "max_tokens": 5, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=scaled.url, timeout=START_S) as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.json()["usage"]["completion_tokens"] == 5
    await until_small(scaled, 0)
    await kervan(scaled, "scale", f"1..{MOST}")
    await asyncio.to_thread(eventually, lambda: len(linked(scaled)) == 1, "one again", START_S)


@pytest.mark.exhaustive
async def test_a_surge_makes_one_replica_eight_and_its_end_one_again(
    home: Home, models: Models, scratch: Path, scaled: Fleet
) -> None:
    config = scratch / "surge.yaml"
    settings = {**SETTINGS, "autoscaling": {**SETTINGS["autoscaling"], "target_ongoing_requests": 8}}
    config.write_text(json.dumps({**settings, "max_queued_streams": 64}))
    name = ("max_model_len=2048", "served_model_name=twin", "max_num_seqs=64")
    fleet = home.up(models.demo, "surge", name, "--config", str(config), "--replicas", "1..8", "--gateways", "1")
    try:
        await until_small(fleet)
        async with load(fleet, models, num_streams=64) as running:
            await eventually_async(lambda: len(linked(fleet)) == 8, "all eight work", START_S)
            num_whole = running.num_whole
            await eventually_async(lambda: running.num_whole > num_whole + 64, "on all of them", START_S)
        async with load(fleet, models, num_streams=8):
            await until_small(fleet)
        assert fleet.total("kervan_streams_broken_total") == 0
    finally:
        assert home.kervan("down", "--name", "surge").returncode == 0


@pytest.mark.exhaustive
async def test_replicas_that_come_and_go_leave_nothing_behind(scaled: Fleet) -> None:
    """24 changes, 24 replicas each way. What lives on is compared with what lived after the first eight changes."""

    def held() -> list[int]:
        """Sockets and threads of the directory and of Serve's controller, which see all of them come and go."""
        names = ("ray::DirectoryActor", "ray::ServeController")
        # Of this fleet: others may run on the machine.
        (pid,) = scaled.gateway_pids().values()
        session = psutil.Process(pid).environ().get("KERVAN_HOME")
        found = [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if any(name in " ".join(process.info["cmdline"] or ()) for name in names)
            and process.environ().get("KERVAN_HOME") == session
        ]
        return [sum(process.num_fds() for process in found), sum(process.num_threads() for process in found)]

    before: list[int] = []
    for number in range(12):
        for count in (3, 1):
            await kervan(scaled, "scale", str(count))
            await eventually_async(lambda count=count: len(linked(scaled)) == count, f"{count} replicas", START_S)
        if number == 3:
            before = held()
    assert len(scaled.status()["replicas"]) == 1
    assert all(now <= 1.2 * then for now, then in zip(held(), before, strict=True))
    assert len(scaling(scaled)["history"]) <= 20
    await kervan(scaled, "scale", f"1..{MOST}")
