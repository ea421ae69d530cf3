"""`kervan bench` from the command line against a server of this process, and what it writes."""

import asyncio
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from kervan import cli
from kervan.bench import compare, faults, records
from kervan.bench.load import Load
from kervan.bench.pacer import Pacer, Schedule
from kervan.cli import bench as bench_command
from kervan.cli import bench_view
from kervan.cli.bench_options import BenchOptions


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with known times that also answers GET, badly: it has no models and no metrics."""
    started: list[Any] = []
    ready = threading.Event()

    def serve() -> None:
        async def main() -> None:
            pacer = Pacer(Schedule(ttft_s=0.02, tick_s=0.005, tokens=6))
            ended = asyncio.Event()
            started.extend([pacer.port, asyncio.get_running_loop(), ended])
            ready.set()
            ticking = asyncio.create_task(pacer.tick_forever())
            await ended.wait()
            ticking.cancel()
            pacer.close()

        asyncio.run(main())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait()
    yield f"http://127.0.0.1:{started[0]}"
    started[1].call_soon_threadsafe(started[2].set)
    thread.join(5)


def bench(*words: str) -> "subprocess.CompletedProcess[str]":
    """`kervan bench words`, in this process: another one would import everything anew. Its workers are processes."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["kervan", "bench", *words])
        try:
            cli.main()
            status: Any = 0
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(sys.argv, status or 0, out.getvalue(), error.getvalue())


def test_json_record_and_report(server: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    done = bench(
        *(server, "--streams", "3", "--num-requests", "9", "--osl", "6", "--model", "m", "--slo", "ttft=5s", "--json"),
        *("--at", "0.02s echo struck", "--record", str(tmp_path / "r"), "--html", str(tmp_path / "r.html")),
        *("--api-key", "secret-key"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["requests"] | {"messages": 0} == {
        "ok": 9, "errors": 0, "truncated": 0, "duplicated": 0, "unfinished": 0, "by_error": {}, "messages": 0,
        "reconnected": 0, "wrong_input_tokens": 9, "without_usage": 0,
    }  # fmt: skip
    assert (found["output_tokens"], found["gap_s"]["count"]) == (54, 45)
    for name in ("ttft_s", "ttft_from_arrival_s", "gap_s", "tpot_s", "e2e_s"):
        assert found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"] <= found[name]["p999"]
    assert found["goodput_req_s"] == pytest.approx(found["req_s"])
    assert found["client_floor"]["cpu_us_per_token"] > 0
    assert found["client_floor"]["ttft_s"] >= 0
    assert found["reconciliation"]["status"] == "unavailable"
    assert found["faults"][0]["output"] == "struck"
    assert 0 < found["streams_achieved"] <= 3

    (path,) = (tmp_path / "r").glob("bench-*.json")
    record = json.loads(path.read_text())
    assert record["result"] == found
    assert record["load"]["streams"] == 3
    assert sum(record["timeline"]["tokens"]) == pytest.approx(54)
    assert "secret-key" not in path.read_text()
    page = (tmp_path / "r.html").read_text()
    assert "secret-key" not in page
    assert "http" not in page.split("<main>")[0].split("<script>")[0]  # nothing to load from elsewhere
    assert "echo struck" in page
    assert "Plotly.newPlot" in page


def test_sweep_and_tables(server: str, tmp_path: Path) -> None:
    done = bench(
        *("--at", "1h kill -9 1"),
        *(server, "--streams", "1,2", "--num-requests", "4", "--osl", "6", "--model", "m", "--no-calibration"),
        *("--html", str(tmp_path / "r.html")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 requests whole, 0 failed") == 2
    assert done.stdout.count("not valid: --at '3600s kill -9 1' was not run: the load ended after") == 2
    assert "Throughput against latency" in (tmp_path / "r.html").read_text()


def test_nothing_listens() -> None:
    done = bench("http://127.0.0.1:9", "--model", "m", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].endswith("connection refused; start the server, or check host and port")


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[bytes]]]:
    """A server without GET that answers 400 to each POST, and what it was sent."""
    asked: list[bytes] = []

    class Refusing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["content-length"])))
            message = b"temperature must be 0 to 2 [/no markup]"
            self.send_response(400)
            self.send_header("Content-Length", str(len(message)))
            self.end_headers()
            self.wfile.write(message)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_load_of_which_nothing_can_succeed_ends_at_once(refusing: tuple[str, list[bytes]], tmp_path: Path) -> None:
    url, asked = refusing
    (tmp_path / "prompts").write_text('{"prompt": "a"}')
    words = ("--model", "m", "--streams", "8", "--duration", "10min", "--no-calibration")
    done = bench(url, *words, "--prompts", str(tmp_path / "prompts"))
    assert done.returncode == 1
    told = re.fullmatch(
        r"not valid: ended early, as no request can succeed \((\d+) http_400\): temperature must be 0 to 2 \[/no markup\]",
        done.stdout.splitlines()[-1],
    )
    assert told is not None, done.stdout
    assert 8 <= int(told[1]) <= len(asked) < 80  # some may be on their way when it ends


def test_what_became_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    effect = faults.Effect(2.0, "kill -9 7", 0, 0.1, "", 90.0, 80.0, 0.1, 1.0, 0.2, 0)
    for exit_code, output, shown in (
        (0, "", "(exit 0)"),
        (1, "oh\nno such process [/x]", "(exit 1: no such process [/x])"),
        (None, "", "(did not finish: killed 7.0 s after it began, when the load had ended)"),
    ):
        ended = dataclasses.replace(effect, exit_code=exit_code, output=output, duration_s=7.0)
        bench_view._print_effect(Console(highlight=False, width=200), ended)
        assert capsys.readouterr().out.splitlines()[0] == f"at 2.0 s: kill -9 7  {shown}"


def test_against_itself(server: str) -> None:
    done = bench(
        *(server, "--against", server, "--pairs", "2", "--streams", "2", "--num-requests", "4", "--osl", "6"),
        *("--no-calibration", "--json"),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["comparisons"]
    assert (row["pairs"], row["pairs_with_errors"]) == (2, 0)
    ratio = row["ratios"]["out_tok_s"]
    assert ratio["ci95"][0] <= ratio["ratio"] <= ratio["ci95"][1]
    assert len(ratio["pairs"]) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere:x"], "not a server URL"),
        (["http://127.0.0.1:9", "--rate", "0"], "--rate '0' is not a number of requests per second above 0"),
        (["http://127.0.0.1:9", "--streams", "many"], "not a whole number from 1 to 65,536"),
        (["http://127.0.0.1:9", "--streams", "2", "--rate", "2"], "kinds of arrivals"),
        (["http://127.0.0.1:9", "--at", "soon"], "--at"),
        (["http://127.0.0.1:9", "--find-rate"], "needs an --slo"),
        (["http://127.0.0.1:9", "--trace", "/nothing.csv"], "/nothing.csv"),
        (["http://127.0.0.1:9", "--header", "nonsense"], "Name: value"),
        (["http://127.0.0.1:9", "--at", "40s true"], "which ends after 30 s"),
        (["http://127.0.0.1:9", "--calls", "3"], "--calls 3 with --turns 1"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_wrong_words(
    words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kervan", "bench", *words, "--no-calibration"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_a_preset_is_options_and_those_given_beside_it_win() -> None:
    def load(*words: str) -> Load:
        given = bench_command.bench.make_context("bench", ["http://127.0.0.1:9", *words]).params
        return BenchOptions(**given).loads()[0]

    agents = load("--turns", "4", "--preset", "agents", "--streams", "3")
    assert (agents.turns, agents.calls, agents.prefixes, agents.prefix_tokens) == (4, 3, 1, 1500)
    assert (agents.isl, agents.osl, agents.think_time_s) == ("150@0.5,400@0.35,1500@0.15", "40@0.6,200@0.4", 1.0)
    assert (agents.requests_per_job, load("--preset", "agents", "--num-requests", "17").num_jobs) == (10, 2)
    plain = load()
    assert (plain.turns, plain.calls, plain.isl) == (1, 1, "64")


SERVER = """
import asyncio, sys
from kervan.bench.pacer import Pacer, Schedule
import kervan.bench.pacer as pacer, socket

async def main():
    create = socket.create_server
    socket.create_server = lambda address, **more: create(("127.0.0.1", int(sys.argv[1])), **more)
    await Pacer(Schedule(0.02, 0.005, 6)).tick_forever()

asyncio.run(main())
"""


def test_servers_that_it_starts_itself_are_ended(tmp_path: Path) -> None:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    command = f"{sys.executable} {path} {{port}}"
    words = ("--pairs", "1", "--num-requests", "2", "--osl", "6", "--model", "m", "--no-calibration", "--json")
    both = bench(command, "--against", command, *words)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout)["comparisons"][0]["pairs"] == 1
    done = bench(command, "--num-requests", "3", "--osl", "6", "--model", "m", "--no-calibration", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"]["ok"] == 3
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or ())]
    broken = bench("echo no such model; exit 3 # {port}", "--num-requests", "3")
    assert broken.returncode == 1
    assert broken.stderr.splitlines()[-1].endswith("exited 3: no such model")


ONE_AT_A_TIME = """
import asyncio, sys
TOKEN = b'data: {"choices": [{"text": " a", "finish_reason": "length"}]}\\n\\n'
END = b'data: {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 1}}\\n\\ndata: [DONE]\\n\\n'
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(TOKEN + END)

async def main():
    turn = asyncio.Lock()
    async def serve(reader, writer):
        while head := await reader.readuntil(b"\\r\\n\\r\\n"):
            length = head.lower().partition(b"content-length: ")[2].partition(b"\\r")[0]
            await reader.readexactly(int(length or 0))
            async with turn:
                await asyncio.sleep(0.015)
            writer.write(HEAD + TOKEN + END)
    await (await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(main())
"""


def test_no_rate_above_the_servers_capacity_keeps_the_slo(tmp_path: Path) -> None:
    """A server that takes 15 ms for each request, one after the other: at 100 requests/s, 33 a second pile up."""
    path = tmp_path / "server.py"
    path.write_text(ONE_AT_A_TIME)
    words = ("--find-rate", "--rate", "50", "--slo", "ttft=150ms", "--isl", "8", "--osl", "1", "--model", "m")
    done = bench(f"{sys.executable} {path} {{port}}", *words, "--trial-time", "1s", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["keeps_up_to"] < 100
    assert found["keeps_up_to"] < found["breaks_from"]
    assert {trial["keeps"] for trial in found["trials"]} == {True, False}


def test_ctrl_c_gives_what_was_measured(server: str, tmp_path: Path) -> None:
    words = ["--streams", "2", "--duration", "10min", "--osl", "6", "--model", "m", "--no-calibration", "--json"]
    at = ["--at", f"0.5s touch {tmp_path / 'half-a-second'}"]
    process = subprocess.Popen(
        # A test run in the background of a script ignores SIGINT, and so would its children.
        ["env", "--default-signal=INT", sys.executable, "-m", "kervan", "bench", server, *words, *at],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "half-a-second").exists():
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    found = json.loads(out)
    assert (found["interrupted"], found["requests"]["errors"]) == (True, 0), error
    assert found["requests"]["ok"] > 0


def test_several_processes_share_the_load(server: str) -> None:
    words = (server, "--streams", "5", "--num-requests", "17", "--osl", "6", "--model", "m", "--no-calibration")
    done = bench(*words, "--processes", "3", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["requests"]["ok"], found["client"]["processes"]) == (0, 17, 3)
    assert (found["output_tokens"], found["ttft_s"]["count"], found["gap_s"]["count"]) == (102, 17, 85)


def test_secrets_stay_out_of_records() -> None:
    words = ["bench", "--api-key", "k1", "--api-key=k2", "--header", "Authorization: Bearer k3", "--seed", "4"]
    shown = " ".join(records.hide_secrets(words))
    assert not any(key in shown for key in ("k1", "k2", "k3"))
    assert shown.endswith("--seed 4")


def test_pairs_alternate() -> None:
    assert list(compare.order(3)) == [(0, ("a", "b")), (1, ("b", "a")), (2, ("a", "b"))]


def test_a_surely_slower_server_is_told() -> None:
    slow = compare.Ratio("out_tok_s", (0.90, 0.91, 0.89, 0.92), 9, 10, (-1, -1, -1, -1))
    unsure = compare.Ratio("out_tok_s", (0.80, 1.02, 0.97, 1.1), 9, 10, (-1, -1, -1, -1))
    assert compare.worst_shortfall([slow], 0.95) is slow
    assert compare.worst_shortfall([slow], 0.85) is None
    assert compare.worst_shortfall([unsure], 0.95) is None
