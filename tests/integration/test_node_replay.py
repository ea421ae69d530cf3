"""Spot nodes of a recorded trace come, and are killed, under recorded requests: on a real Ray cluster of twins."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.live import START_S, Home, none_is_left
from harness.shared_fleet import REPOSITORY, Models

from kervan.config.workload import read_trace

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]

TRACES = REPOSITORY / "benchmarks/traces"
REQUESTS = TRACES / "azure_conv_2023_first_3min.csv"


@pytest.mark.exhaustive
def test_a_trace_of_nodes_is_played(home: Home, models: Models) -> None:
    """22 minutes in 44 s: node-3 is there, node-8 comes and is killed, node-10 comes, and both are killed."""
    words = ("--replay", str(TRACES / "spotserve_0304.txt"), "--trace", str(REQUESTS))
    more = ("--speed", "30", "--trace-speed", "0.5", "--deadline", "0s", "--json")
    before = (home.fleets(), home.ray_directories())
    done = home.kervan("chaos", str(models.demo), *words, *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found = json.loads(done.stdout)
    assert [found[key] for key in ("broken", "tokens_lost", "tokens_doubled", "tokens_wrong")] == [0, 0, 0, 0]
    # The load ends after 44 s: 22 s of the trace of requests.
    assert found["streams"] == sum(row.at_s < 22.0 for row in read_trace(REQUESTS)) == 36
    assert (found["nodes_added"], found["nodes_removed"], found["unrecovered"]) == (3, 3, 0)
    # What is not ready yet when its node goes is no disruption; node-3's replica is, as the load waits for it.
    assert 1 <= found["kinds"]["kill"]["disruptions"] == found["disruptions"] <= 3
    rows = found["over_time"]
    assert (rows[0]["nodes"], rows[0]["spot"], rows[-1]["nodes"], rows[-1]["spot"]) == (1, 1, 0, 0)
    assert max(row["nodes"] for row in rows) == 2
    assert rows[-1]["on-demand"] == 2  # cover
    assert (home.fleets(), home.ray_directories()) == before


def test_a_replay_that_is_told_to_end_leaves_nothing(
    scratch: Path, models: Models, strays: Callable[..., list[str]]
) -> None:
    """By SIGTERM, for which Ray, and there is one in the command itself, brings a handler of its own."""
    home = Home(scratch, "untold", keeps_warm=False)
    known, alive_before = home.ray_directories(), strays()
    words = ("--replay", str(TRACES / "spotserve_0304.txt"), "--trace", str(REQUESTS), "--json")
    with subprocess.Popen(**home.command("chaos", str(models.demo), *words), stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = [process.stderr.readline()]
        while said[-1] and "starting the fleet, then" not in said[-1]:
            said.append(process.stderr.readline())
        process.terminate()
        told, rest = process.communicate(timeout=START_S)
    assert (process.returncode, told) == (130, ""), [*said, rest]
    assert (home.fleets(), home.ray_directories()) == ([], known)
    none_is_left(lambda: strays(*known), alive_before)
