"""`kervan bench` on a fleet of real vLLM replicas: exact counts, and the same as the server's own. And on twins, a kill."""

import json
from typing import Any

import pytest
from harness.live import Fleet, Home, eventually


def bench(home: Home, fleet: Fleet, *words: str, model: str = "tiny", is_strict: bool = False) -> dict[str, Any]:
    """What the bench says. Strictly, it fails where the server's mean TTFT is another: of few requests, one that waits
    for this machine's two cores before it is at the server makes it so.
    """
    strict = ["--strict"] if is_strict else []
    done = home.kervan("bench", fleet.url, "--model", model, "--no-calibration", "--json", *strict, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_counts_agree(found: dict[str, Any]) -> None:
    rows = found["reconciliation"]["rows"]
    for what in ("requests", "output tokens", "input tokens"):
        assert rows[what]["client"] == rows[what]["server"], what
        assert rows[what]["agrees"], what


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_counts_are_exact_and_those_of_the_server(whole_fleet: Fleet, home: Home, api: str) -> None:
    eventually(whole_fleet.is_idle, "nobody else counts", 30)
    words = ("--streams", "4", "--num-requests", "48", "--isl", "50..90", "--osl", "5..40", "--api", api)
    found = bench(home, whole_fleet, *words, is_strict=True)
    requests = found["requests"]
    assert (requests["ok"], requests["errors"], requests["wrong_input_tokens"]) == (48, 0, 0)
    server = found["server"]
    assert (server["product"], server["layout"], server["simulated"]) == ("kervan", "TP1", False)
    assert server["replicas"] >= 1
    rows = found["reconciliation"]["rows"]
    assert found["reconciliation"]["status"] == "agrees"
    assert rows["output tokens"]["client"] == rows["output tokens"]["server"] == found["output_tokens"]
    assert rows["input tokens"]["client"] == rows["input tokens"]["server"] == found["input_tokens"]
    assert 48 * 50 <= found["input_tokens"] <= 48 * 90


def test_an_answer_that_ends_by_itself_is_whole(whole_fleet: Fleet, home: Home) -> None:
    eventually(whole_fleet.is_idle, "nobody else counts", 30)
    found = bench(
        home,
        whole_fleet,
        "--num-requests",
        "3",
        "--api",
        "chat",
        "--stop-at-eos",
        "--osl",
        "400",
        "--set",
        "temperature=0",
    )
    assert (found["requests"]["ok"], found["requests"]["errors"]) == (3, 0)
    assert_counts_agree(found)


def test_conversations_contain_what_was_answered(whole_fleet: Fleet, home: Home) -> None:
    words = ("--streams", "2", "--num-requests", "6", "--turns", "3", "--isl", "60", "--osl", "10", "--api", "chat")
    eventually(whole_fleet.is_idle, "nobody else counts", 30)
    found = bench(home, whole_fleet, *words)
    assert (found["requests"]["ok"], found["output_tokens"]) == (6, 60)
    assert_counts_agree(found)
    assert found["input_tokens"] > 6 * 60  # later turns carry the earlier ones


def test_a_replica_killed_during_the_load_costs_no_request(twins: Fleet, home: Home) -> None:
    twins.wait_until_whole(3, 1)
    words = ("--streams", "8", "--num-requests", "32", "--osl", "30", "--at", f"500ms kill -9 {twins.pids()[0]}")
    found = bench(home, twins, *words, model="twin")
    assert (found["requests"]["ok"], found["requests"]["errors"]) == (32, 0)
    (effect,) = found["faults"]
    assert effect["exit_code"] == 0
    assert effect["errors"] == 0
    assert twins.total("kervan_streams_moved_total") > 0
    twins.wait_until_whole(3, 1)
