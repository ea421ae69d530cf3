"""Where the time goes at several loads: `kervan profile` on a fleet of one replica, and what profiling itself costs.

    python benchmarks/profile_h200.py --out DIR                                   # 1x H200, under 9 minutes
    python benchmarks/profile_h200.py --out DIR --engine twin --streams 64,256    # the gateway, without a GPU
    python benchmarks/profile_h200.py --out DIR --model MODEL --streams 4 --isl 64 --osl 64 --up=--engine-arg \\
        --up=enforce_eager=true      # a tiny model on a CPU

The 8B shape with random weights, 1024 in and 128 to 384 out, at 1, 64 and 256 streams in a closed loop. At each load
tokens/s are counted without a profile, then with it (half of it torch's profiler, half py-spy), then without again,
each from the end of a round of the streams to that of another; so are the streams that broke or moved. Answers are of
several lengths, so that streams do not prefill all at once. Writes one file, profile-h200.tar, with a record, and the
page, the numbers and the timeline of each load. The table comes last.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from kervan.bench import records  # noqa: E402
from kervan.direct_http import open_direct  # noqa: E402

NAME = "profiled"
COUNTERS = {
    "ended": "kervan_streams_ended_total",
    "tokens": "kervan_replica_generated_tokens_total",
    "moved": "kervan_streams_moved_total",
    "broken": "kervan_streams_broken_total",
}
TWIN = ("--gpu", "H200", *(f"--twin={key}=0" for key in ("prefill_token_s", "sequence_s", "context_token_s")))
LOAD_BEGINS_S = 8.0
LOAD_S = 3600.0  # longer than anything here: it is ended when all has been counted
LONGEST_S = 120.0  # of a round, and of what is waited for before it
POLL_S = 0.25


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


def next_round(
    counted: Callable[[], dict[str, float]], streams: int, *, zero: float, not_before_s: float = 0.0
) -> dict[str, float]:
    """The counters when the next round has just ended: as many requests as there are streams, from `zero` on.

    Streams of a closed loop prefill and decode together, so a time that is no whole round sees more of one than of the
    other. Raises: TimeoutError when no round ends.
    """
    since, seen = time.monotonic(), math.inf
    while True:
        now = counted()
        rounds = (now["ended"] - zero) // streams
        if rounds > seen and now["at_s"] >= not_before_s:
            return now
        seen = rounds
        if time.monotonic() - since > LONGEST_S:
            raise TimeoutError(f"no round of {streams} streams ended within {LONGEST_S:.0f} s")
        time.sleep(POLL_S)


def between(first: dict[str, float], second: dict[str, float], streams: int) -> dict[str, float]:
    """Tokens per second between two moments, and how many rounds and seconds that was."""
    more = {key: second[key] - first[key] for key in ("tokens", "ended", "at_s")}
    return {"tok_s": more["tokens"] / more["at_s"], "rounds": more["ended"] / streams, "seconds": more["at_s"]}


@contextlib.contextmanager
def loaded(url: str, args: argparse.Namespace, streams: int, for_s: float) -> Iterator[subprocess.Popen[str]]:
    """`kervan bench` with so many streams, in a process of its own."""
    words = ["bench", url, "--streams", str(streams), "--duration", f"{for_s:.0f}s", "--isl", str(args.isl)]
    words += ["--osl", args.osl, "--json"]
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
    with loaded(url, args, streams, LOAD_S) as load:

        def counted() -> dict[str, float]:
            if load.poll() is not None:
                raise ValueError(f"the load ended by itself, with status {load.returncode}")
            return counters(url)

        time.sleep(LOAD_BEGINS_S / 4)  # streams of another load have ended, none of this one
        zero = counted()["ended"]
        time.sleep(LOAD_BEGINS_S)
        next_round(counted, streams, zero=zero)  # answers of several lengths come apart
        begun = next_round(counted, streams, zero=zero)
        at_command = next_round(counted, streams, zero=zero, not_before_s=begun["at_s"] + args.rate_s)
        words = ("profile", "--name", NAME, "--for", f"{args.for_s:g}s", "--steps", str(args.steps), "--out", str(out))
        told = json.loads(kervan(*words, "--json", timeout_s=args.for_s + 200))
        command_s = time.monotonic() - at_command["at_s"]
        profiled = next_round(counted, streams, zero=zero)
        ended = next_round(counted, streams, zero=zero, not_before_s=profiled["at_s"] + args.rate_s)
    return {
        "streams": streams,
        "before": between(begun, at_command, streams),
        "profiled": between(at_command, profiled, streams),
        "after": between(profiled, ended, streams),
        "command_s": command_s,
        "moved": ended["moved"] - begun["moved"],
        "broken": ended["broken"] - begun["broken"],
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
            f"{load['streams']:>8}{load['before']['tok_s']:>10,.0f}{load['profiled']['tok_s']:>10,.0f}"
            f"{load['after']['tok_s']:>10,.0f}{load['moved']:>7.0f}{load['broken']:>7.0f}{us:>18}  {waits}"
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
    parser.add_argument("--osl", default="128..384", help="as `kervan bench` takes it")
    parser.add_argument("--steps", type=int, default=100, help="of the engine, that are traced")
    parser.add_argument("--for", dest="for_s", type=float, default=12.0)
    parser.add_argument("--rate-s", type=float, default=8.0, help="tokens are counted so long at least")
    parser.add_argument("--step-s", type=float, default=0.1, help="of a twin")
    parser.add_argument("--port", type=int, default=18640)
    parser.add_argument("--up", action="append", default=[], help="one more word of `kervan up`")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a fleet would be left behind
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
