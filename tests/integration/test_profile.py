"""`kervan profile` on live fleets: streams go on, whole and where they are, and what it writes can be read."""

import asyncio
import gzip
import json
from pathlib import Path

import pytest
from harness.live import Fleet
from harness.undisturbed import answers_undisturbed, under_load

from kervan.profile import trace as traces

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]

NUM_STREAMS = 8


async def test_a_replica_is_profiled_under_load_and_no_stream_moves_or_breaks(
    whole_fleet: Fleet, tmp_path: Path
) -> None:
    fleet = whole_fleet
    expected = await answers_undisturbed(fleet)
    moved, lost = fleet.total("kervan_streams_moved_total"), fleet.total("kervan_replicas_lost_total")
    pids = fleet.pids()
    async with under_load(fleet, expected, NUM_STREAMS) as load:
        words = ("profile", "--name", fleet.name, "--for", "4s", "--out", str(tmp_path / "new"), "--json")
        done = await asyncio.to_thread(fleet.home.kervan, *words)
        await load.finish()
    assert done.returncode == 0, done.stderr
    load.assert_whole(expected)
    assert fleet.pids() == pids
    assert fleet.total("kervan_streams_moved_total") == moved
    assert fleet.total("kervan_replicas_lost_total") == lost
    told = json.loads(done.stdout)
    assert told["replica"] in {replica["id"] for replica in fleet.status()["replicas"]}
    assert told["gpu_waits_for"] is None and told["steps"]["traced"] > 0 and told["kernels"]
    assert sum(told["shares"].values()) == pytest.approx(1, abs=0.01) and told["shares"]["forward"] > 0
    assert len(told["gateways"]) == 2 and sum(gateway["us_per_token"] for gateway in told["gateways"]) > 0
    assert told["requests"]["count"] >= 1 and told["next"]
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names >= {"index.html", "profile.perfetto.json.gz", "summary.json"}
    file = gzip.decompress((tmp_path / "new" / "profile.perfetto.json.gz").read_bytes())
    assert traces.steps(traces.read(file)), "the steps are named in the timeline"


def test_a_replica_can_be_profiled_again_and_without_work(whole_fleet: Fleet, tmp_path: Path) -> None:
    fleet = whole_fleet
    replica = fleet.status()["replicas"][1]["id"]
    words = ("profile", replica, "--name", fleet.name, "--for", "2s", "--no-py-spy", "--out", str(tmp_path))
    done = fleet.home.kervan(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"replica {replica}, 2 s" and len(lines) <= 27
    assert any(line.startswith("next: nothing here: the replica had no request for") for line in lines)
    assert not any("left out" in line for line in lines)


def test_twins_are_profiled_without_an_engine_and_wrong_replicas_are_refused(twins: Fleet, tmp_path: Path) -> None:
    words = ("--name", twins.name, "--for", "2s", "--out", str(tmp_path), "--json")
    done = twins.home.kervan("profile", *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["left_out"][0] == "torch's profiler: the replicas are twins, which have no engine"
    assert told["gateways"] and told["shares"] == {}
    wrong = twins.home.kervan("profile", "nobody", *words)
    assert wrong.returncode == 1 and "has no replica 'nobody'; ready are " in wrong.stderr
    short = twins.home.kervan("profile", "--for", "1s", "--name", twins.name)
    assert short.returncode == 2 and "--for 1 s is outside 2..600 s; write for example --for 10s" in short.stderr
    nowhere = twins.home.kervan("profile", *words[:4], "--out", str(tmp_path / "a" / "b"))
    assert nowhere.returncode == 2 and "does not exist; make it first" in nowhere.stderr
