"""Where the time goes at several loads: `kervan profile` on a fleet of one replica, and what profiling itself costs.

    python benchmarks/profile_h200.py --out DIR                                   # 1x H200, under 9 minutes
    python benchmarks/profile_h200.py --out DIR --engine twin --streams 64,256    # the gateway, without a GPU
    python benchmarks/profile_h200.py --out DIR --model MODEL --streams 4 --isl 64 --osl 64 --up=--engine-arg \\
        --up=enforce_eager=true      # a tiny model on a CPU

The 8B shape with random weights, 1024 in and 256 out, at 1, 64 and 256 streams in a closed loop. At each load tokens/s
are counted over a while without a profile, then with it (half of it torch's profiler, half py-spy), then without again;
so are the streams that broke or moved. Writes one file, profile-h200.tar, with a record, and the page, the numbers and
the timeline of each load. The table comes last.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from kervan.bench import records  # noqa: E402
from kervan.direct_http import open_direct  # noqa: E402

NAME = "profiled"
COUNTERS = {
    "tokens": "kervan_replica_generated_tokens_total",
    "moved": "kervan_streams_moved_total",
    "broken": "kervan_streams_broken_total",
}
TWIN = ("--gpu", "H200", *(f"--twin={key}=0" for key in ("prefill_token_s", "sequence_s", "context_token_s")))
LOAD_BEGINS_S, AFTER_S = 8.0, 4.0


def kervan(*words: str, timeout_s: float) -> str:
    """What a command prints. Raises: CalledProcessError, after its words on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *words], stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s
    )
    return done.stdout


def counters(url: str) -> dict[str, float]:
    """Of all gateways, now; `at_s` on this process's clock."""
    with open_direct(f"{url}/metrics", timeout_s=30) as response:
        lines = response.read().decode().splitlines()
    found = {
        key: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
        for key, name in COUNTERS.items()
    }
    return found | {"at_s": time.monotonic()}


def rate(url: str, seconds: float) -> float:
    """Tokens per second from now."""
    before = counters(url)
    time.sleep(seconds)
    after = counters(url)
    return (after["tokens"] - before["tokens"]) / (after["at_s"] - before["at_s"])


@contextlib.contextmanager
def loaded(url: str, args: argparse.Namespace, streams: int, for_s: float) -> Iterator[subprocess.Popen[str]]:
    """`kervan bench` with so many streams, in a process of its own."""
    words = ["bench", url, "--streams", str(streams), "--duration", f"{for_s:.0f}s", "--isl", str(args.isl)]
    words += ["--osl", str(args.osl), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kervan", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def one_load(url: str, args: argparse.Namespace, streams: int, out: Path) -> dict[str, Any]:
    """The profile at so many streams, and tokens/s around it."""
    whole_s = LOAD_BEGINS_S + 2 * args.rate_s + args.for_s + args.slack_s
    with loaded(url, args, streams, whole_s):
        time.sleep(LOAD_BEGINS_S)
        before, rate_before = counters(url), rate(url, args.rate_s)
        begun = counters(url)
        words = ("profile", "--name", NAME, "--for", f"{args.for_s:g}s", "--out", str(out), "--json")
        told = json.loads(kervan(*words, timeout_s=args.for_s + 200))
        ended, rate_after = counters(url), rate(url, args.rate_s)
        after = counters(url)
    profiled_s = ended["at_s"] - begun["at_s"]
    return {
        "streams": streams,
        "tok_s_before": rate_before,
        "tok_s_profiled": (ended["tokens"] - begun["tokens"]) / profiled_s,
        "tok_s_after": rate_after,
        "command_s": profiled_s,
        "moved": after["moved"] - before["moved"],
        "broken": after["broken"] - before["broken"],
        "profile": told,
    }


def table(loads: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each load, and what each said."""
    heads = (
        ("streams", 8),
        ("tok/s", 10),
        ("profiled", 10),
        ("after", 10),
        ("moved", 7),
        ("broken", 7),
        ("us/token", 18),
    )
    yield "".join(f"{head:>{width}}" for head, width in heads) + "  waits for"
    for load in loads:
        profile = load["profile"]
        us = ", ".join(f"{gateway['us_per_token']:.0f}" for gateway in profile["gateways"])
        waits = profile["gpu_waits_for"] or "(no GPU)"
        yield (
            f"{load['streams']:>8}{load['tok_s_before']:>10,.0f}{load['tok_s_profiled']:>10,.0f}"
            f"{load['tok_s_after']:>10,.0f}{load['moved']:>7.0f}{load['broken']:>7.0f}{us:>18}  {waits}"
        )
    for load in loads:
        profile = load["profile"]
        yield f"\n{load['streams']} streams: {profile['shares']}"
        for kernel in profile["kernels"][:8]:
            yield f"  {kernel['share']:6.1%} {kernel['calls']:>8,} x {kernel['name']} ({kernel['bound']})"
        for gateway in profile["gateways"]:
            yield f"  gateway, us per token: {gateway['us_per_token_by_part']}"
        yield f"  next: {profile['next']}"
        for problem in profile["left_out"]:
            yield f"  left out: {problem}"


def up_words(args: argparse.Namespace, model: Path) -> list[str]:
    """Of `kervan up`."""
    words = [
        "up",
        str(model),
        "--name",
        NAME,
        "--port",
        str(args.port),
        "--replicas",
        "1",
        "--gateways",
        "1",
        "--detach",
    ]
    if args.engine == "twin":
        words += ["--engine", "twin", *TWIN, f"--twin=base_s={args.step_s:g}", "--engine-arg", "max_model_len=2048"]
    elif args.model is None:
        words += ["--engine-arg", "load_format=dummy", "--engine-arg", "max_model_len=8192"]
        words += ["--engine-arg", "enable_prefix_caching=false"]
    return [*words, *args.up]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a model directory; else the 8B shape with random weights")
    parser.add_argument("--engine", choices=("vllm", "twin"), default="vllm")
    parser.add_argument("--streams", default="1,64,256")
    parser.add_argument("--isl", type=int, default=1024)
    parser.add_argument("--osl", type=int, default=256)
    parser.add_argument("--for", dest="for_s", type=float, default=12.0)
    parser.add_argument("--rate-s", type=float, default=8.0, help="how long tokens are counted before and after")
    parser.add_argument("--slack-s", type=float, default=40.0, help="longest that a profile takes beyond --for")
    parser.add_argument("--step-s", type=float, default=0.1, help="of a twin")
    parser.add_argument("--port", type=int, default=18640)
    parser.add_argument("--up", action="append", default=[], help="one more word of `kervan up`")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    source = str(HERE.parent / "src")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kp-") as place:
        folder, model = Path(place), args.model
        os.environ["KERVAN_HOME"] = str(folder / "home")
        if model is None:
            model = folder / "llama3-8b"
            shape = [
                sys.executable,
                str(HERE / "shape_model.py"),
                str(HERE / "models/llama3-8b/config.json"),
                str(model),
            ]
            subprocess.run(shape, check=True, stdout=subprocess.DEVNULL)
        loads: list[dict[str, Any]] = []
        failed: list[str] = []
        files = folder / "profile-h200"
        files.mkdir()
        try:
            kervan(*up_words(args, model), timeout_s=400)
            for streams in map(int, args.streams.split(",")):
                out = files / f"{streams}-streams"
                try:
                    loads.append(one_load(f"http://127.0.0.1:{args.port}", args, streams, out))
                    print(f"{streams} streams: done", file=sys.stderr, flush=True)
                except (subprocess.SubprocessError, OSError, ValueError) as error:  # the other loads may do
                    failed.append(f"{streams} streams: {type(error).__name__}: {error}")
        finally:
            subprocess.run([sys.executable, "-m", "kervan", "down", "--name", NAME], check=False, timeout=120)
            if (folder / "home" / "logs").exists():
                (folder / "home" / "logs").rename(files / "logs")
            command = "python benchmarks/profile_h200.py " + " ".join(sys.argv[1:])
            content = records.record("profile", {"engine": args.engine, "loads": loads, "failed": failed}) | {
                "command": command
            }
            (files / "record.json").write_text(json.dumps(content, indent=1) + "\n")
            with tarfile.open(args.out / "profile-h200.tar", "w") as tar:
                tar.add(files, arcname=files.name)
    print("\n".join([*table(loads), *failed]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
