"""`kervan simulate`: its JSON, the same from run to run, and one clear line for what makes no sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.command_line import Kervan
from harness.places import MODELS, TRACES

SMALL = str(MODELS / "llama3-8b")
BASE = ("--model", SMALL, "--gpu", "H200")
LOAD = ("--rate", "2/s", "--duration", "20s", "--isl", "64..256", "--osl", "8..32")


@pytest.fixture
def kervan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kervan:
    return Kervan(monkeypatch, capsys, "simulate")


def test_json_has_what_scripts_read(kervan: Kervan) -> None:
    found = kervan.json(*BASE, *LOAD, "--min", 2, "--max", 3, "--policy", "fixed:2", "--seed", 4)
    (policy,) = found["policies"]
    assert found["seed"] == 4
    assert found["events_per_s"] > 0
    assert policy["name"] == "fixed:2"
    assert policy["slo_attainment"] == 1.0
    assert 20 <= policy["requests"] <= 60
    assert policy["mean_replicas"] == pytest.approx(2.0)
    assert policy["replica_hours"] == pytest.approx(2 * policy["episode_s"] / 3600)
    assert policy["usd"] == pytest.approx(policy["usd_per_mtok"] * policy["output_tokens"] / 1e6)
    assert set(policy["ttft_s"]) == {"p50", "p95", "p99"}
    assert (policy["moves"], policy["broken"]) == (0, 0)


def test_the_same_seed_gives_the_same_json_in_another_process_too(kervan: Kervan) -> None:
    words = [*BASE, *LOAD, "--max", "2", "--policy", "fixed,fixed:1", "--seeds", "2", "--gateways", "2", "--json"]
    found = kervan.json(*words[:-1], "--processes", 1)
    for extra in ([], ["--processes", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", "kervan", "simulate", *words, *extra],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        again = json.loads(done.stdout)
        assert again.pop("events_per_s") > 0
        assert again == {name: value for name, value in found.items() if name != "events_per_s"}


def test_several_seeds_give_intervals(kervan: Kervan) -> None:
    found = kervan.json(*BASE, *LOAD, "--seeds", 3, "--processes", 1)
    (policy,) = found["policies"]
    low, high = policy["interval_95"]["slo_attainment"]
    assert low <= policy["slo_attainment"] <= high
    assert policy["seeds"] == [0, 1, 2]


def test_a_ramp_is_written_as_steps_or_as_bench_writes_it(kervan: Kervan) -> None:
    steps = kervan.json(*BASE, "--ramp", "2:10s,4:5s", "--arrivals", "constant", "--osl", 8)
    stages = kervan.json(*BASE, "--ramp", "2@10s,4@5s", "--arrivals", "constant", "--osl", 8)
    assert steps["policies"] == stages["policies"]
    assert steps["policies"][0]["requests"] == 40


def test_a_trace_brings_its_own_lengths(kervan: Kervan, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    found = kervan.json(*BASE, "--trace", path, "--trace-speed", "2x")
    assert found["policies"][0]["requests"] == 2
    assert found["policies"][0]["output_tokens"] == 153


def test_a_replica_s_rate_can_be_given_and_the_model_s_own_is_told(kervan: Kervan) -> None:
    found = kervan.json(*BASE, *LOAD, "--replica-rate", "3/s", "--slo", "ttft=1s,tpot=50ms")
    rate = found["replica_rate"]
    assert rate["requests_per_s"] == 3.0
    assert rate["unscaled_requests_per_s"] > 3
    assert rate["step_time_scale"] > 1
    assert any("unscaled" in note for note in found["notes"])


def test_people_get_a_table(kervan: Kervan) -> None:
    code, out, _ = kervan.run(SMALL, "--gpu", "H200", *LOAD)
    assert code == 0
    assert "in SLO" in out
    assert "100.00%" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H200", *LOAD], "--model"),
        (["--model", SMALL, *LOAD], "--gpu"),
        ([SMALL, *BASE, *LOAD], "twice"),
        ([*BASE[:3], "H2000", *LOAD], "H2000"),
        (["--model", SMALL, "--gpu", "local", *LOAD], "local"),
        (["--model", "no/such/dir", "--gpu", "H200", *LOAD], "no/such/dir"),
        ([*BASE], "--ramp"),
        ([*BASE, *LOAD, "--ramp", "2:10s"], "--ramp and --rate"),
        ([*BASE, "--ramp", "2:10s", "--duration", "5s"], "--duration"),
        ([*BASE, "--ramp", "2-10s"], "2:330s"),
        ([*BASE, "--ramp", "2:10x"], "2:330s"),
        ([*BASE, "--ramp", "-2:10s"], "2:330s"),
        ([*BASE, "--ramp", "0:10s"], "rate and a duration"),
        ([*BASE, "--ramp", "900000:10h"], "at most"),
        ([*BASE, "--ramp", "0.001:9000h"], "days"),
        ([*BASE, "--rate", "0", "--duration", "5s"], "--rate"),
        ([*BASE, "--rate", "2/s", "--duration", "0s"], "duration"),
        ([*BASE, "--rate", "nan"], "--rate"),
        ([*BASE, "--trace", "no/such/file.csv"], "does not exist"),
        ([*BASE, "--trace", str(TRACES), "--isl", "5"], "--isl"),
        ([*BASE, *LOAD, "--trace-speed", "2"], "--trace-speed"),
        ([*BASE, *LOAD, "--isl", "-5"], "--isl"),
        ([*BASE, *LOAD, "--osl", "0"], "--osl"),
        ([*BASE, *LOAD, "--isl", "9000000"], "longer than"),
        ([*BASE, *LOAD, "--slo", "ttft=2"], "unit"),
        ([*BASE, *LOAD, "--policy", "slooo"], "did you mean"),
        ([*BASE, *LOAD, "--policy", "fixed,fixed"], "twice"),
        ([*BASE, *LOAD, "--policy", "fixed:many"], "fixed:8"),
        ([*BASE, *LOAD, "--policy", ""], "known"),
        ([*BASE, *LOAD, "--min", "5", "--max", "2"], "--min 2 --max 5"),
        ([*BASE, *LOAD, "--max", "0"], "--max"),
        ([*BASE, *LOAD, "--min", "two"], "two"),
        ([*BASE, *LOAD, "--pool", "spot"], "spot:0..6"),
        ([*BASE, *LOAD, "--pool", "spots:2"], "spot"),
        ([*BASE, *LOAD, "--pool", "on-demand:2", "--min", "1"], "--min"),
        ([*BASE, *LOAD, "--start-time", "soon"], "--start-time"),
        ([*BASE, *LOAD, "--start-time", "90s..10s"], "10s..90s"),
        ([*BASE, *LOAD, "--start-time", "lognormal:median=90s"], "sigma"),
        ([*BASE, *LOAD, "--replica-rate", "fast"], "--replica-rate"),
        ([*BASE, *LOAD, "--layout", "pp=2"], "pp=2"),
        ([*BASE, *LOAD, "--layout", "dp=2"], "--max"),
        ([*BASE, *LOAD, "--layout", "tp=3"], "tp"),
        ([*BASE, *LOAD, "--engine-arg", "max_model_leng=5"], "max_model_len"),
        ([*BASE, *LOAD, "--price", "free"], "--price"),
        ([*BASE, *LOAD, "--seed", "one"], "--seed"),
        ([*BASE, *LOAD, "--seeds", "0"], "--seeds"),
        ([*BASE, *LOAD, "--gateways", "1..4"], "--gateways"),
        ([*BASE, *LOAD, "--spot", "no/such/file"], "node trace"),
        ([*BASE, *LOAD, "--losses", "often"], "--losses"),
        ([*BASE, *LOAD, "--html", "no/such/dir/x.html"], "does not exist"),
        ([*BASE, *LOAD, "--arrivals", "gamma", "--burstiness", "0"], "--burstiness"),
        ([*BASE, *LOAD, "--decide-every", "1h"], "--decide-every"),
        ([*BASE, *LOAD, "--nothing"], "--nothing"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_wrong_input_gets_one_line_that_names_the_fix(kervan: Kervan, words: list[str], said: str) -> None:
    code, out, err = kervan.run(*words)
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_model_that_does_not_fit_is_refused_with_what_is_missing(kervan: Kervan) -> None:
    code, _, err = kervan.run("--model", MODELS / "llama3-70b", "--gpu", "L4", "--layout", "tp=1", *LOAD)
    assert code == 1
    assert "does not fit" in err
    assert err.count("\n") == 1


def test_an_overload_ends_and_sheds_what_finds_no_room(kervan: Kervan) -> None:
    found = kervan.json(
        *BASE, "--ramp", "burst:5000,2000:2s", "--osl", "400", "--max", 1, "--max-queued-streams", 64, "--processes", 1
    )
    (policy,) = found["policies"]
    assert policy["shed"] > 5000
    assert policy["shed"] + policy["finished"] == policy["requests"]
    assert policy["broken"] == 0
