"""Fleets that start, cannot start, or are stopped on the way; and what they leave, which is nothing."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.live import ENVIRONMENT, SMALL, START_S, Fleet, Home, eventually, is_alive, none_is_left
from prometheus_client.parser import text_string_to_metric_families

from kervan.demo import PAIRS
from kervan.ports import free_port

QUESTION, ANSWER = next(iter(PAIRS.items()))


def arguments(*words: str) -> list[str]:
    return [word for assignment in (*SMALL, *words) for word in ("--engine-arg", assignment)]


def assert_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """One line that begins with "error:", holds `words`, and is all besides progress."""
    said = [line for line in done.stderr.splitlines() if not re.match(r"\[ *[0-9.]+ s\] |INFO ", line)]
    assert done.returncode in (1, 2), done.stderr
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: "), done.stderr
    for word in words:
        assert word in said[0]
    assert done.stdout == ""


def test_name_in_use(fleet: Fleet, home: Home, models: Any) -> None:
    done = home.kervan("up", str(models.demo), "--name", fleet.name, "--port", str(free_port()), "--detach")
    assert_refused(done, f"127.0.0.1:{fleet.port} will no longer serve requests", "--yes")
    other = home.kervan("up", str(models.embedding), "--name", fleet.name, "--detach")
    assert_refused(other, "cannot become", "--name", "kervan down")
    assert fleet.get("/health/ready").status_code == 200
    assert fleet.get("/health/ready").status_code == 200


def test_port_in_use(fleet: Fleet, home: Home, models: Any) -> None:
    done = home.kervan("up", str(models.demo), "--name", "other", "--port", str(fleet.port), "--detach")
    assert_refused(done, f"port {fleet.port}", "--port")
    assert home.fleets() == [fleet.name]


def test_unknown_fleet(fleet: Fleet, home: Home) -> None:
    for command in (("status",), ("scale", "1"), ("down",)):
        assert_refused(home.kervan(*command, "--name", "nobody"), "nobody", fleet.name)


def test_missing_model(home: Home, tmp_path: Path) -> None:
    assert_refused(home.kervan("up", str(tmp_path / "nothing"), "--port", str(free_port())), "nothing")
    (tmp_path / "config.json").write_text("{}")
    assert_refused(home.kervan("up", str(tmp_path), "--port", str(free_port())), "config.json")


def test_too_little_memory_for_the_cache(
    fleet: Fleet, home: Home, models: Any, strays: Callable[..., list[str]]
) -> None:
    """Known only after the engine has loaded the model; the attempt is undone, and the fleet beside it lives."""
    done = home.kervan(
        *("up", str(models.demo), "--name", "poor", "--port", str(free_port()), "--detach"),
        *arguments("max_model_len=2048", "kv_cache_memory_bytes=1000000"),
    )
    assert_refused(done, "max_model_len")
    assert home.fleets() == [fleet.name]
    assert_refused(home.kervan("status", "--name", "poor"), "no fleet 'poor'")
    eventually(lambda: not any("kervan-poor:" in left for left in strays()), "no process of the fleet is left", 20)
    assert fleet.get("/health/ready").status_code == 200


def test_a_gateway_that_vllm_refuses(fleet: Fleet, home: Home, models: Any) -> None:
    """Twins read no engine arguments, so the gateway is the first to see that this one makes no sense."""
    done = home.kervan(
        *("up", str(models.demo), "--name", "poor", "--port", str(free_port()), "--detach", *ENVIRONMENT),
        *("--engine", "twin", "--gpu", "H200", *arguments("max_model_len=4096")),
    )
    assert_refused(done, "Fix: a max_model_len within the model's own context length")
    assert home.fleets() == [fleet.name]


def test_ctrl_c_during_start(scratch: Path, models: Any, strays: Callable[..., list[str]]) -> None:
    home = Home(scratch, "interrupted", keeps_warm=False)
    known, alive_before = home.ray_directories(), strays()
    words = home.command(
        *("up", str(models.demo), "--port", str(free_port()), *arguments("max_model_len=512")),
        *ENVIRONMENT,
    )
    with subprocess.Popen(**words, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), True)
        deadline_s, said = time.monotonic() + START_S, ""
        while "replicas and" not in said and "0/1 replicas" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
            assert time.monotonic() < deadline_s, said
        eventually(lambda: list((home.path / "logs").glob("default-*.log")), "an engine is starting", 60)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, said + rest
    assert rest.splitlines()[-1] == "stopped"
    assert home.fleets() == []
    assert not (home.path / "local_ray.json").exists()
    assert home.ray_directories() == known
    none_is_left(lambda: strays(*known), alive_before)
    assert_refused(home.kervan("status"), "kervan up")


@contextlib.contextmanager
def in_the_foreground(home: Home, models: Any, name: str) -> Iterator["subprocess.Popen[str]"]:
    """`kervan up` of a twin, once it says what stops it."""
    words = ("up", str(models.demo), "--name", name, "--port", str(free_port()), "--engine", "twin", "--gpu", "H200")
    with subprocess.Popen(
        **home.command(*words, *ENVIRONMENT), stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = []
        while "Ctrl-C stops it" not in lines:
            line = process.stdout.readline()
            assert line, lines
            lines.append(line.strip())
        yield process


def test_a_fleet_in_the_foreground_ends_with_its_command(
    fleet: Fleet, scratch: Path, models: Any, strays: Callable[..., list[str]]
) -> None:
    """With its Ray. Systemd and Kubernetes send SIGTERM, for which Ray brings a handler of its own.

    All but the session's warm process, which it may be the first to need; that a user's ends with Ray too,
    `test_ctrl_c_during_start` shows.
    """
    home = Home(scratch, "fore")
    known, alive_before = home.ray_directories(), strays()
    with in_the_foreground(home, models, "fore") as process:
        process.send_signal(signal.SIGTERM)
        rest, said = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "stopping\n"), said
    assert (home.fleets(), home.ray_directories()) == ([], known)
    none_is_left(lambda: [left for left in strays(*known) if "warm_process" not in left], alive_before)
    logs = [log.read_text() for log in (home.path / "logs").glob("fore-gw-*.log")]
    assert len(logs) == 1
    assert "Traceback" not in logs[0]


def test_ctrl_c_ends_the_fleet_in_the_foreground_alone(fleet: Fleet, home: Home, models: Any) -> None:
    """And not Ray, where others are."""
    known = home.ray_directories()
    with in_the_foreground(home, models, "fore") as process:
        brief = Fleet(home, "fore", fleet.url, fleet.port)
        pids = [*brief.pids(), *brief.gateway_pids().values()]
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "stopping\n"), said
    assert (home.fleets(), home.ray_directories()) == ([fleet.name], known)
    assert len(pids) == 2
    eventually(lambda: not any(map(is_alive, pids)), f"processes {pids} are gone", 20)
    assert fleet.is_whole()


@pytest.mark.parametrize("stream", [False, True])
def test_metrics(fleet: Fleet, stream: bool) -> None:
    """One valid page for the whole fleet, whose counters agree with what was asked and answered."""
    before = {name: fleet.total(name) for name in ("vllm:generation_tokens_total", "vllm:request_success_total")}
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 9, "ignore_eos": True, "stream": stream}
    for _ in range(6):  # over connections of their own, so over both gateways
        with fleet.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 200
    eventually(
        lambda: fleet.total("vllm:request_success_total") == before["vllm:request_success_total"] + 6,
        "six requests are counted",
        10,
    )
    assert fleet.total("vllm:generation_tokens_total") == before["vllm:generation_tokens_total"] + 54
    page = fleet.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = [family.name for family in text_string_to_metric_families(page.text)]
    assert len(families) == len(set(families))
    samples = fleet.metrics()
    gateways = {labels["gateway"] for labels, _ in samples["vllm:request_success_total"]}
    assert gateways == set(fleet.gateway_pids())
    replicas = {labels["replica"] for labels, _ in samples["kervan_replica_running"]}
    assert replicas == {replica["id"] for replica in fleet.status()["replicas"]}
    assert fleet.total("kervan_replicas", state="ready") == 2
    assert "vllm:time_to_first_token_seconds_bucket" in samples


def test_status_is_what_scripts_rely_on(fleet: Fleet, models: Any) -> None:
    status = fleet.status()
    assert status["url"] == fleet.url
    assert status["model"] == str(models.demo)
    assert status["layout"] == {"tp": 1, "pp": 1, "ep": 1, "nodes_per_replica": 1}
    keys = {"id", "pool", "node", "pid", "state", "running", "waiting", "kv_cache_usage", "draining"}
    for replica in status["replicas"]:
        assert keys <= set(replica)
    for gateway in status["gateways"]:
        assert {"id", "pid"} <= set(gateway)
