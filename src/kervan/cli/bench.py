"""`kervan bench`."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from kervan.cli import options
from kervan.config.workload import LENGTHS_HELP
from kervan.errors import ConfigError

SECTIONS = {
    "Arrivals": "--streams --rate --arrivals --burstiness --burst --stages --trace --trace-speed --num-requests "
    "--duration --max-streams",
    "Prompts": "--isl --osl --prefix --turns --think-time --prompts --tokenizer --seed",
    "Requests": "--api --model --set --stop-at-eos --per-chunk-usage --header --api-key --insecure --timeout",
    "Measuring": "--slo --stall --find-rate --attain --trial-time --against --pairs --fail-below --at --processes "
    "--no-calibration",
    "Output": "--strict --json --record --html --help",
}
ARRIVALS = ["poisson", "gamma", "constant"]


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("url")
@click.option("--streams", help="Closed loop: each stream asks again when it is answered; 1,16,64 is a sweep.")
@click.option("--rate", help="Open loop: requests/s, whether or not the server keeps up; 1,2,4 is a sweep.")
@click.option("--arrivals", type=click.Choice(ARRIVALS), default="poisson", show_default=True, help="Of an open loop.")
@click.option("--burstiness", type=float, default=1.0, help="Shape of gamma arrivals: 1 is Poisson, less is burstier.")
@click.option("--burst", type=int, help="So many requests at once.")
@click.option("--stages", help="2@30s,2..10@1min,burst:100: rates, ramps and bursts one after the other.")
@click.option("--trace", type=click.Path(), help="Replay an Azure CSV or Mooncake JSONL trace.")
@click.option("--trace-speed", type=float, default=1.0, help="2: twice as fast as recorded.")
@click.option("--num-requests", type=int, help="End after so many requests.")
@click.option("--duration", help="Start no request after so long: 30s, 5min.")
@click.option("--isl", default="64", show_default=True, help=f"Prompt tokens: {LENGTHS_HELP}.")
@click.option("--osl", default="64", show_default=True, help="Output tokens, in the same forms.")
@click.option("--prefix", help="4x512: each prompt begins with one of 4 shared prefixes of 512 tokens.")
@click.option("--turns", type=int, default=1, help="Requests in a conversation; needs --api chat.")
@click.option("--think-time", default="0s", help="Between an answer and the next turn.")
@click.option("--prompts", type=click.Path(), help="JSONL with prompt, messages or prompt_token_ids in each line.")
@click.option("--api", type=click.Choice(["completions", "chat"]), help="[default: completions, or as --prompts needs]")
@click.option("--model", help="Name to ask for; without it, the one that the server has.")
@click.option("--tokenizer", help="Directory or Hugging Face id, for servers that take no token ids.")
@click.option(
    "--set", "sampling", multiple=True, metavar="KEY=VALUE", help="Goes into each request's body; repeatable."
)
@click.option("--stop-at-eos", is_flag=True, help="Let answers end by themselves; without it ignore_eos is sent.")
@click.option("--per-chunk-usage", is_flag=True, help="Request for token counts in every chunk: exact gaps per token.")
@click.option("--header", "headers", multiple=True, metavar="NAME: VALUE", help="Goes with each request; repeatable.")
@click.option("--api-key", help="Sent as a bearer token; or KERVAN_API_KEY.")
@click.option("--insecure", is_flag=True, help="Do not check TLS certificates.")
@click.option("--slo", "slo_text", help="What counts as good: ttft=1s,tpot=50ms,e2e=20s.")
@click.option("--stall", default="1s", show_default=True, help="A gap of at least this is a stall.")
@click.option("--timeout", default="600s", show_default=True, help="A request may take so long.")
@click.option("--max-streams", type=int, default=10_000, show_default=True, help="Arrivals beyond it are errors.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same prompts and arrivals.")
@click.option("--processes", type=int, help="Client processes; without it, as few as carry the load.")
@click.option("--no-calibration", is_flag=True, help="Do not measure the client first; nothing tells what it adds.")
@click.option(
    "--find-rate", is_flag=True, help="Search the highest rate that keeps the SLO; --rate is where it begins."
)
@click.option("--attain", type=float, default=0.95, show_default=True, help="Share of requests that must keep the SLO.")
@click.option("--trial-time", default="1min", show_default=True, help="Of each rate, at most.")
@click.option("--against", metavar="URL", help="A second server: pairs of runs, in the order A B B A, and their ratio.")
@click.option("--pairs", type=int, default=4, show_default=True, help="With --against.")
@click.option("--fail-below", type=float, help="With --against: exit 1 if the ratio of tokens/s is surely below this.")
@click.option("--at", "actions", multiple=True, metavar="'10s COMMAND'", help="Run a shell command then; repeatable.")
@click.option("--strict", is_flag=True, help="Exit 1 if the run is not valid or the server's metrics disagree.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--record", type=click.Path(path_type=Path), help="Write a record to this file or directory.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a report with plots to this file.")
def bench(url: str, **given: Any) -> None:
    """Load the OpenAI-compatible server at URL and measure it.

    URL may be a command that starts one, with {port} in it; it is ended afterwards. Exit status 1 if no request
    succeeded; with --strict also if the numbers cannot be trusted.
    """
    from kervan.bench import servers
    from kervan.cli import render

    loads, api = _loads(given)
    read = {
        "slo": _slo(given["slo_text"]),
        "actions": [_action(text) for text in given["actions"]],
        "headers": _headers(given),
        "sampling": _sampling(given["sampling"]),
    }
    say = render.progress_lines()
    with servers.reach(url, say) as reached:
        status = _measure(reached, loads, api, say, given | read)
    sys.exit(status)


def _measure(url: str, loads: list[Any], api: Any, say: Any, given: dict[str, Any]) -> int:
    """Measure a server that runs; the exit status."""
    from kervan.bench import benchmark, records, servers
    from kervan.cli import bench_view, render

    slo, actions = given["slo"], given["actions"]
    say(f"looking at {url}")
    prepared = benchmark.prepare(
        url,
        loads[0],
        model=given["model"],
        api=api,
        headers=given["headers"],
        sampling=given["sampling"],
        verify_tls=not given["insecure"],
        tokenizer=given["tokenizer"],
    )
    if prepared.probe.complaint:
        say(prepared.probe.complaint)
    client = benchmark.ClientOptions(processes=given["processes"], calibrates=not given["no_calibration"])
    if given["find_rate"]:
        return _find_rate(prepared, loads[0], slo, client, say, given)
    if given["against"] is not None:
        with servers.reach(given["against"], say) as against:
            return _compare(prepared, against, loads, slo, client, say, given)
    results = []
    for load in loads:
        with bench_view.live(load, is_shown=sys.stderr.isatty()) as on_progress:
            results.append(
                benchmark.measure(
                    prepared, load, slo=slo, client=client, actions=actions, on_progress=on_progress, say=say
                )
            )
        if not given["as_json"]:
            bench_view.print_result(results[-1])
        if results[-1].outcome.was_interrupted:
            break
    contents = [result.content() for result in results]
    if given["as_json"]:
        found = [content["result"] for content in contents]
        render.print_json(found[0] if len(loads) == 1 else {"sweep": found})
    _record(contents[0] if len(loads) == 1 else {"sweep": contents}, say, given)
    if given["html"] is not None:
        from kervan.bench import html_report, report_plots

        runs = [
            report_plots.ReportedRun(_name(result.load), records.record("bench", content), result.tally.wholes())
            for result, content in zip(results, contents, strict=True)
        ]
        html_report.write(given["html"], runs)
        say(f"report: {given['html']}")
    if not all(result.tally.ok for result in results):
        return 1
    return int(given["strict"] and any(r.doubts() or r.reconciliation.status == "disagrees" for r in results))


def _record(content: dict[str, Any], say: Any, given: dict[str, Any]) -> None:
    from kervan.bench import records

    if given["record"] is not None:
        say(f"record: {records.write(given['record'], records.record('bench', content))}")


def _find_rate(prepared: Any, load: Any, slo: Any, client: Any, say: Any, given: dict[str, Any]) -> int:
    """Search the highest rate; the exit status."""
    from kervan.bench import benchmark
    from kervan.cli import bench_view, render
    from kervan.units import parse_duration_s

    start_rate = load.stages[0].start_rate if load.stages else 1.0
    answer = benchmark.find_rate(
        prepared, load, slo=slo, attain=given["attain"], start_rate=start_rate, client=client,
        max_s=parse_duration_s(given["trial_time"], "--trial-time"), say=say,
    )  # fmt: skip
    found = answer.to_dict()
    endpoint = {"url": prepared.endpoint.url, "model": prepared.endpoint.model}
    _record({"target": endpoint, "load": load.to_dict(), **found}, say, given)
    if given["as_json"]:
        render.print_json(found)
    else:
        bench_view.print_rate(answer)
    return 0 if answer.keeps_up_to > 0 else 1


def _compare(
    prepared: Any, against: str, loads: list[Any], slo: Any, client: Any, say: Any, given: dict[str, Any]
) -> int:
    """Pairs of runs of two servers; the exit status."""
    import dataclasses

    from kervan.bench import benchmark, client_floor, compare
    from kervan.cli import bench_view, render

    other = benchmark.prepare(
        against, loads[0], api=prepared.endpoint.api, headers=prepared.endpoint.headers,
        sampling=prepared.endpoint.sampling, verify_tls=prepared.endpoint.verify_tls, tokenizer=given["tokenizer"],
    )  # fmt: skip
    sides = {"a": prepared, "b": other}
    rows, status = [], 0
    for load in loads:
        floor = None
        if client.calibrates:
            floor = client_floor.choose(load.expected_streams)

        def measure(side: Any, pair: int, load: Any = load, floor: Any = floor) -> Any:
            one = dataclasses.replace(load, seed=load.seed + 1000 * pair)
            result = benchmark.measure(sides[side], one, slo=slo, client=client, floor=floor)
            say(f"pair {pair + 1}, {_name(load)}: {side.upper()} {result.out_tok_s:,.1f} tok/s, "
                f"{result.tally.num_errors} failed")  # fmt: skip
            return result

        pairs = compare.run_pairs(given["pairs"], measure)
        found = compare.ratios(pairs)
        failed = sum(bool(a.tally.num_errors or b.tally.num_errors) for a, b in pairs)
        rows.append(
            {
                "load": load.to_dict(),
                "pairs": len(pairs),
                "pairs_with_errors": failed,
                "ratios": {ratio.name: ratio.to_dict() for ratio in found},
                "runs": [[a.to_dict(), b.to_dict()] for a, b in pairs],
            }
        )
        if not given["as_json"]:
            bench_view.print_ratios(_name(load), found, len(pairs), failed)
        bound = given["fail_below"]
        if not found or (bound is not None and compare.worst_shortfall(found, bound) is not None):
            status = 1
    content = {"a": prepared.endpoint.url, "b": other.endpoint.url, "comparisons": rows}
    _record(content, say, given)
    if given["as_json"]:
        short = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
        render.print_json({**content, "comparisons": short})
    return status


def _name(load: Any) -> str:
    if load.streams is not None:
        return f"{load.streams} streams" if load.streams != 1 else "1 stream"
    return f"{load.stages[0].start_rate:g}/s" if load.stages and not load.stages[0].burst else "open loop"


def _numbers(text: str | None, option: str, kind: Any) -> list[Any]:
    """`"1,16,64"` as numbers; [None] of None."""
    if text is None:
        return [None]
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no number; write 16, or 1,16,64 for a sweep") from error


def _loads(given: dict[str, Any]) -> tuple[list[Any], Any]:
    """One load, or those of a sweep, and the API they need."""
    if given["find_rate"] and given["rate"] is None:
        given = {**given, "rate": "1"}
    if given["trace"] is None and not any(given[name] is not None for name in ("streams", "rate", "burst", "stages")):
        given = {**given, "streams": "1"}
    found = [
        _load({**given, "streams": streams, "rate": rate})
        for streams in _numbers(given["streams"], "--streams", int)
        for rate in _numbers(given["rate"], "--rate", float)
    ]
    return [load for load, _ in found], found[0][1]


def _load(given: dict[str, Any]) -> tuple[Any, Any]:
    """The load, and the API it needs."""
    from kervan.bench import arrivals
    from kervan.bench.load import Load
    from kervan.bench.prompts import read_prompts
    from kervan.units import parse_duration_s

    stages: tuple[arrivals.Stage, ...] = ()
    if sum(given[name] is not None for name in ("rate", "burst", "stages")) > 1:
        raise ConfigError("--rate, --burst and --stages exclude each other; --stages can say all three")
    if given["rate"] is not None:
        stages = arrivals.steady(given["rate"])
    elif given["burst"] is not None:
        stages = arrivals.parse_stages(f"burst:{given['burst']}")
    elif given["stages"] is not None:
        stages = arrivals.parse_stages(given["stages"])
    num_requests, duration_s = given["num_requests"], None
    if given["duration"] is not None:
        duration_s = parse_duration_s(given["duration"], "--duration")
    streams = given["streams"]
    if num_requests is None and duration_s is None and (streams is not None or given["rate"] is not None):
        duration_s = 30.0
    prefixes, prefix_tokens = _prefix(given["prefix"])
    api = given["api"]
    if api is None:
        api = "completions"
        if given["prompts"] and "messages" in read_prompts(Path(given["prompts"]))[0]:
            api = "chat"
        if given["turns"] > 1:
            api = "chat"
    if given["find_rate"] and given["slo_text"] is None:
        raise ConfigError("--find-rate needs an --slo, like ttft=1s,tpot=50ms")
    if given["turns"] > 1 and api != "chat":
        raise ConfigError("--turns needs --api chat: a conversation is a list of messages")
    load = Load(
        streams=streams,
        stages=stages,
        process=given["arrivals"],
        burstiness=given["burstiness"],
        trace=given["trace"],
        trace_speed=given["trace_speed"],
        num_requests=num_requests,
        duration_s=duration_s,
        isl=given["isl"],
        osl=given["osl"],
        prefixes=prefixes,
        prefix_tokens=prefix_tokens,
        turns=given["turns"],
        think_time_s=parse_duration_s(given["think_time"], "--think-time"),
        prompts=given["prompts"],
        ignore_eos=not given["stop_at_eos"],
        tokens_in_chunks=given["per_chunk_usage"],
        seed=given["seed"],
        timeout_s=parse_duration_s(given["timeout"], "--timeout"),
        max_streams=given["max_streams"],
        stall_s=parse_duration_s(given["stall"], "--stall"),
    )
    return load, api


def _prefix(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    number, _, tokens = text.partition("x")
    if not (number.isdigit() and tokens.isdigit()):
        raise ConfigError(f"--prefix {text!r}: write 4x512 for 4 prefixes of 512 tokens")
    return int(number), int(tokens)


def _slo(text: str | None) -> Any:
    from kervan.config.workload import Slo, parse_slo

    return Slo() if text is None else parse_slo(text)


def _action(text: str) -> Any:
    from kervan.bench.drive import Action
    from kervan.units import parse_duration_s

    at, _, command = text.strip().partition(" ")
    if not command.strip():
        raise ConfigError(f"--at {text!r} has no command; write --at '10s kill -9 1234'")
    return Action(parse_duration_s(at, "--at"), command.strip())


def _headers(given: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for text in given["headers"]:
        name, separator, value = text.partition(":")
        if not separator or not name.strip() or "\n" in text or "\r" in text:
            raise ConfigError(f"--header {text!r}: write 'Name: value'")
        found.append((name.strip(), value.strip()))
    key = given["api_key"] or os.environ.get("KERVAN_API_KEY")
    return [*found, ("Authorization", f"Bearer {key}")] if key else found


def _sampling(texts: tuple[str, ...]) -> dict[str, Any]:
    import json

    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r}: write --set temperature=0")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
