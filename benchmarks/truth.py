"""Load testers against a server whose times are known: what each one reports, and what it should have.

The server (truth_server.c) has the first core, each client the second one, as a client that shares a busy machine has.
Tools besides kervan are given by how to start them, each from an environment of its own:

    python benchmarks/truth.py --streams 1,200,1600
    python benchmarks/truth.py --streams 1,200 --vllm /envs/vllm/bin/python --guidellm /envs/guidellm/bin/guidellm \\
        --aiperf /envs/aiperf/bin/aiperf --tokenizer DIR

A run in which the server itself was late by more than 2 ms on average is tried again, twice at most, and marked.
"""

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from overhead import hardware, output_of, record_path, versions

HERE = Path(__file__).resolve().parent
ISL = OSL = 64
MAX_LATE_MS = 2.0
# `vllm bench serve` without the `vllm` command, which the CPU wheel does not start.
VLLM_BENCH_SERVE = (
    "from vllm.benchmarks import serve; from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
MAX_TOKENS_PER_S = 32_000  # above it the server needs a core and more, and is late itself


@dataclass(frozen=True)
class Seen:
    """What a tool reported, in milliseconds; None where it does not."""

    ttft_p50_ms: float
    ttft_p99_ms: float | None
    gap_p50_ms: float | None
    out_tok_s: float | None
    cpu_us_per_token: float | None = None  # of the load alone, where the tool says so


@dataclass(frozen=True)
class Tool:
    name: str
    command: Callable[[str, int, int, Path], list[str]]  # (url, streams, requests, output folder)
    read: Callable[[str, Path], Seen]


def kervan_tool() -> Tool:
    def command(url: str, streams: int, requests: int, _: Path) -> list[str]:
        words = [
            sys.executable,
            "-m",
            "kervan",
            "bench",
            url,
            "--streams",
            str(streams),
            "--num-requests",
            str(requests),
        ]
        return [*words, "--isl", str(ISL), "--osl", str(OSL), "--processes", "1", "--no-calibration", "--json"]

    def read(text: str, _: Path) -> Seen:
        found = json.loads(text)
        if found["requests"]["errors"]:
            raise ValueError(f"errors: {found['requests']['by_error']}")
        ttft, cpu_us = found["ttft_s"], found["client"]["cpu_us_per_token"]
        return Seen(1e3 * ttft["p50"], 1e3 * ttft["p99"], 1e3 * found["gap_s"]["p50"], found["out_tok_s"], cpu_us)

    return Tool("kervan", command, read)


def vllm_tool(python: str, tokenizer: str) -> Tool:
    def command(url: str, streams: int, requests: int, out: Path) -> list[str]:
        words = [python, "-c", VLLM_BENCH_SERVE, "--backend", "openai", "--base-url", url, "--model", "truth"]
        words += ["--endpoint", "/v1/completions", "--tokenizer", tokenizer, "--dataset-name", "random"]
        words += ["--random-input-len", str(ISL), "--random-output-len", str(OSL), "--num-prompts", str(requests)]
        words += ["--max-concurrency", str(streams), "--ignore-eos", "--save-result", "--result-dir", str(out)]
        return [*words, "--result-filename", "vllm.json", "--percentile-metrics", "ttft,itl", "--disable-tqdm"]

    def read(_: str, out: Path) -> Seen:
        found = json.loads((out / "vllm.json").read_text())
        return Seen(found["median_ttft_ms"], found["p99_ttft_ms"], found["median_itl_ms"], found["output_throughput"])

    return Tool("vllm bench serve", command, read)


def guidellm_tool(program: str, tokenizer: str) -> Tool:
    def command(url: str, streams: int, requests: int, out: Path) -> list[str]:
        words = [program, "run", "--backend", f"kind=openai_http,target={url},model=truth", "--tokenizer"]
        words += [f"kind=huggingface_auto,model={tokenizer}", "--profile", f"kind=concurrent,streams={streams}"]
        words += ["--data", f"kind=synthetic_text,prompt_tokens={ISL},output_tokens={OSL}"]
        words += ["--constraint", f"kind=max_requests,count={requests}", "--disable-progress"]
        return [*words, "--output", f"kind=json,path={out / 'guidellm.json'}"]

    def read(_: str, out: Path) -> Seen:
        (path,) = out.glob("*.json")
        metrics = json.loads(path.read_text())["benchmarks"][0]["metrics"]

        def of(name: str, q: str) -> float:
            return float(metrics[name]["successful"]["percentiles"][q])

        rate = float(metrics["output_tokens_per_second"]["successful"]["mean"])
        return Seen(
            of("time_to_first_token_ms", "p50"),
            of("time_to_first_token_ms", "p99"),
            of("inter_token_latency_ms", "p50"),
            rate,
        )

    return Tool("guidellm", command, read)


def aiperf_tool(program: str, tokenizer: str) -> Tool:
    def command(url: str, streams: int, requests: int, out: Path) -> list[str]:
        words = [program, "profile", "-m", "truth", "--url", url, "--endpoint-type", "completions", "--streaming"]
        words += ["--concurrency", str(streams), "--request-count", str(requests), "--tokenizer", tokenizer]
        words += ["--isl", str(ISL), "--osl", str(OSL), "--extra-inputs", "ignore_eos:true", "--ui", "none"]
        return [*words, "--output-artifact-dir", str(out)]

    def read(_: str, out: Path) -> Seen:
        (path,) = out.rglob("profile_export_aiperf.json")
        found = json.loads(path.read_text())
        ttft, gap = found["time_to_first_token"], found["inter_token_latency"]
        return Seen(ttft["p50"], ttft["p99"], gap["p50"], found["output_token_throughput"]["avg"])

    return Tool("aiperf", command, read)


@contextmanager
def server(program: Path, ttft_ms: float, gap_ms: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Its URL, and a function that ends it and gives how late it was."""
    cores = sorted(os.sched_getaffinity(0))
    process = subprocess.Popen(
        ["taskset", "-c", str(cores[0]), str(program), "0", str(ttft_ms), str(gap_ms)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()

    def end() -> dict[str, Any]:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    try:
        yield f"http://127.0.0.1:{port}", end
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def measure(tool: Tool, program: Path, streams: int, requests: int, gap_ms: float, args: argparse.Namespace) -> Any:
    """One run of a tool; what it saw beside the truth."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, server(program, args.ttft_ms, gap_ms) as (url, end):
        out = Path(folder)
        command = ["taskset", "-c", str(cores[-1]), *tool.command(url, streams, requests, out)]
        before, begin_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout_s, check=False)
        after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - begin_s
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row: dict[str, Any] = {
            "tool": tool.name, "streams": streams, "requests": requests, "wall_s": wall_s,
            "true_ttft_ms": args.ttft_ms, "true_gap_ms": gap_ms, "command": plain(shlex.join(command), args, folder),
        }  # fmt: skip
        try:
            row["seen"] = tool.read(done.stdout, out).__dict__
        except (ValueError, KeyError, OSError, TypeError) as error:
            row["failed"] = f"exit {done.returncode}, {error!r}: {(done.stderr or done.stdout)[-400:]}"
        row["server"] = end()
    writes = row["server"]["writes"]
    row["cpu_us_per_token"] = 1e6 * cpu_s / writes if writes else None
    return row


def plain(command: str, args: argparse.Namespace, folder: str = "") -> str:
    """A command without the places that only this machine has."""
    places = {args.vllm: "VLLM_PYTHON", args.guidellm: "guidellm", args.aiperf: "aiperf", args.tokenizer: "TOKENIZER"}
    for path, word in {**places, folder: "OUT", sys.executable: "python"}.items():
        if path:
            command = command.replace(path, word)
    return command


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "streams",
        "tool",
        "TTFT p50",
        "p99",
        "off by",
        "gap p50",
        "off by",
        "us/token",
        "with start",
        "server late ms",
    ]
    lines = [head]
    for row in rows:
        late = f"{row['server']['late_mean_ms']:.2f}" + (" !" if row["server"]["late_mean_ms"] > MAX_LATE_MS else "")
        if "failed" in row:
            lines.append([str(row["streams"]), row["tool"], "failed", "", "", "", "", "", "", late])
            continue
        seen = row["seen"]

        def off(value: float | None, truth: float) -> str:
            return "-" if value is None else f"{100 * (value / truth - 1):+.1f}%"

        def ms(value: float | None) -> str:
            return "-" if value is None else f"{value:.1f}"

        lines.append(
            [
                *(str(row["streams"]), row["tool"], ms(seen["ttft_p50_ms"]), ms(seen["ttft_p99_ms"])),
                *(off(seen["ttft_p50_ms"], row["true_ttft_ms"]), ms(seen["gap_p50_ms"])),
                *(
                    off(seen["gap_p50_ms"], row["true_gap_ms"]),
                    ms(seen["cpu_us_per_token"]),
                    f"{row['cpu_us_per_token']:.0f}",
                    late,
                ),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,200,1600", help="N,N,..")
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="requests per stream")
    parser.add_argument("--vllm", help="python that has vLLM")
    parser.add_argument("--guidellm", help="guidellm's program")
    parser.add_argument("--aiperf", help="aiperf's program")
    parser.add_argument("--tokenizer", help="directory, for the other tools")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--record-dir", type=Path, default=HERE / "records")
    args = parser.parse_args()
    others = (("vllm", vllm_tool), ("guidellm", guidellm_tool), ("aiperf", aiperf_tool))
    tools = [kervan_tool()]
    for name, make in others:
        if getattr(args, name):
            if not args.tokenizer:
                parser.error(f"--{name} needs --tokenizer")
            tools.append(make(getattr(args, name), args.tokenizer))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "truth_server"
        subprocess.run(["cc", "-O2", "-o", program, HERE / "truth_server.c"], check=True)
        for streams in map(int, args.streams.split(",")):
            gap_ms = max(20.0, 1e3 * streams / MAX_TOKENS_PER_S)
            requests = max(8, streams * args.rounds)
            for repeat in range(args.repeats):
                for tool in tools:
                    for _ in range(3):
                        row = measure(tool, program, streams, requests, gap_ms, args)
                        if row["server"]["late_mean_ms"] <= MAX_LATE_MS:
                            break
                    rows.append(row | {"repeat": repeat})
                    print(table([row]).splitlines()[-1], row.get("failed", ""), flush=True)
    known: dict[str, Any] = versions() | {"cc": output_of("cc", "--version").partition("\n")[0]}
    for name in ("guidellm", "aiperf"):
        if program_path := getattr(args, name):
            known[name] = output_of(program_path, "--version").splitlines()[-1:] or "unknown"
    with suppress(metadata.PackageNotFoundError):
        known["httptools"] = metadata.version("httptools")
    record = {
        "what": "truth",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plain(shlex.join(["python", "benchmarks/truth.py", *sys.argv[1:]]), args),
        "hardware": hardware(),
        "versions": known,
        "rows": rows,
    }
    path = record_path(record, args.record_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nrecord: {path}\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
