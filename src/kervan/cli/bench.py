"""`kervan bench`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kervan.bench.arrivals import Process
from kervan.bench.load import Api, Load
from kervan.bench.saturation import RateSearchOptions
from kervan.cli import option_types, options, outputs
from kervan.config.workload import LENGTHS_HELP
from kervan.errors import ConfigError
from kervan.units import plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from kervan.bench.benchmark import Prepared
    from kervan.bench.compare import Side
    from kervan.bench.result import Result
    from kervan.cli.bench_options import BenchOptions

SECTIONS = {
    "Arrivals": "--streams --rate --arrivals --burstiness --burst --stages --trace --trace-speed --num-requests "
    "--duration --max-streams",
    "Prompts": "--isl --osl --prefix --turns --calls --think-time --preset --prompts --tokenizer --seed",
    "Requests": "--api --model --set --stop-at-eos --per-chunk-usage --header --api-key --insecure --timeout",
    "Measuring": "--slo --stall --find-rate --attain --trial-time --against --pairs --fail-below --at --processes "
    "--no-calibration",
    "Output": "--strict --json --record --html --help",
}


# Prompts and conversations by name, as options of the command.
PRESETS: dict[str, dict[str, str]] = {
    "agents": {
        "prefix": "1x1500", "turns": "6", "calls": "3", "think_time": "1s", "isl": "150@0.5,400@0.35,1500@0.15",
        "osl": "40@0.6,200@0.4",
    },
}  # fmt: skip


def _apply_preset(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    if name is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("url")
@click.option(
    "--streams", type=option_types.Sweep(option_types.STREAMS),
    help="Closed loop: each stream sends its next request when the last has ended; 1,16,64 is a sweep.",
)  # fmt: skip
@click.option(
    "--rate", type=option_types.Sweep(option_types.RATE),
    help="Open loop: requests per second, like 5/s or 300/min, whether or not the server keeps up; 1,2,4 is a sweep.",
)  # fmt: skip
@click.option(
    "--arrivals", type=click.Choice(get_args(Process)), default=Load.process, show_default=True, help="Of an open loop."
)
@click.option(
    "--burstiness",
    type=option_types.NUMBER,
    default=Load.burstiness,
    help="Shape of gamma arrivals: 1 is Poisson, less is burstier.",
)
@click.option("--burst", type=int, help="So many requests at once.")
@click.option("--stages", help="2@30s,2..10@1min,burst:100: rates, ramps and bursts one after the other.")
@click.option("--trace", type=option_types.FILE, help="Replay an Azure CSV or Mooncake JSONL trace.")
@click.option("--trace-speed", type=option_types.FACTOR, default=Load.trace_speed, help="2: twice as fast as recorded.")
@click.option("--num-requests", type=int, help="End after so many requests.")
@click.option("--duration", type=option_types.DURATION, help="Start no request after so long: 30s, 5min.")
@click.option(
    "--isl", type=option_types.LENGTHS, default=Load.isl, show_default=True, help=f"Prompt tokens: {LENGTHS_HELP}."
)
@click.option(
    "--osl", type=option_types.LENGTHS, default=Load.osl, show_default=True, help="Output tokens, in the same forms."
)
@click.option("--prefix", help="4x512: each prompt begins with one of 4 shared prefixes of 512 tokens.")
@click.option("--turns", type=int, default=Load.turns, help="Requests in a conversation, sent as chat.")
@click.option(
    "--calls", type=int, default=Load.calls,
    help="So many at once in each turn after the first; the conversation goes on from one of them.",
)  # fmt: skip
@click.option(
    "--preset", type=click.Choice(tuple(PRESETS)), is_eager=True, expose_value=False, callback=_apply_preset,
    help="agents: --prefix, --turns, --calls, --think-time, --isl and --osl as agents with tools have them; "
    "what is given beside it wins.",
)  # fmt: skip
@click.option(
    "--think-time", type=option_types.DURATION, default=f"{Load.think_time_s:g}s", show_default=True,
    help="Between an answer and the next turn.",
)  # fmt: skip
@click.option("--prompts", type=click.Path(), help="JSONL with prompt, messages or prompt_token_ids in each line.")
@click.option(
    "--api", type=click.Choice(get_args(Api)), help="[default: completions; chat for --turns, or as --prompts needs]"
)
@click.option("--model", help="Name to ask for; without it, the one that the server has.")
@click.option("--tokenizer", help="Directory or Hugging Face id, for servers that take no token ids.")
@click.option(
    "--set", "sampling", multiple=True, metavar="KEY=VALUE", help="Goes into each request's body; repeatable."
)
@click.option("--stop-at-eos", is_flag=True, help="Let answers end by themselves; without it ignore_eos is sent.")
@click.option("--per-chunk-usage", is_flag=True, help="Ask for token counts in every chunk: exact gaps per token.")
@click.option("--header", "headers", multiple=True, metavar="NAME: VALUE", help="Goes with each request; repeatable.")
@click.option("--api-key", help="Sent as a bearer token; or KERVAN_API_KEY.")
@click.option("--insecure", is_flag=True, help="Do not check TLS certificates.")
@click.option("--slo", "given_slo", type=option_types.SLO, help="What counts as good: ttft=1s,tpot=50ms,e2e=20s.")
@click.option(
    "--stall", type=option_types.DURATION, default=f"{Load.stall_s:g}s", show_default=True,
    help="A gap of at least this is a stall.",
)  # fmt: skip
@click.option(
    "--timeout", type=option_types.DURATION, default=f"{Load.timeout_s:g}s", show_default=True,
    help="A request may take so long.",
)  # fmt: skip
@click.option(
    "--max-streams", type=int, default=Load.max_streams, show_default=True, help="Arrivals beyond it are errors."
)
@click.option("--seed", type=int, default=Load.seed, show_default=True, help="Same seed, same prompts and arrivals.")
@click.option(
    "--processes", type=click.IntRange(1, 1024), help="Client processes; without it, as few as carry the load."
)
@click.option("--no-calibration", is_flag=True, help="Do not measure the client's own overhead first.")
@click.option(
    "--find-rate", is_flag=True, help="Search the highest rate that keeps the SLO; --rate is where it begins."
)
@click.option("--attain", type=option_types.SHARE, default=RateSearchOptions.attain, show_default=True,
              help="Share of requests that must keep the SLO.")  # fmt: skip
@click.option(
    "--trial-time",
    type=option_types.DURATION,
    default=f"{RateSearchOptions.max_trial_s:g}s",
    show_default=True,
    help="Of each rate, at most.",
)
@click.option("--against", metavar="URL", help="A second server: pairs of runs, in the order A B B A, and their ratio.")
@click.option("--pairs", type=click.IntRange(1, 1000), default=4, show_default=True, help="With --against.")
@click.option(
    "--fail-below",
    type=option_types.NUMBER,
    help="With --against: exit 1 if the ratio of tokens/s is surely below this.",
)
@click.option("--at", "actions", multiple=True, metavar="'10s COMMAND'", help="Run a shell command then; repeatable.")
@click.option("--strict", is_flag=True, help="Exit 1 if the run is not valid or the server's metrics disagree.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--record", type=option_types.FILE, help="Write a record to this file or directory.")
@click.option("--html", type=option_types.FILE, help="Write a report with plots to this file.")
def bench(**arguments: Any) -> None:
    """Load the OpenAI-compatible server at URL and measure it.

    URL may be a command that starts one, with {port} in it; it is ended afterwards. Exit status 1 if no request
    succeeded; with --strict also if the numbers cannot be trusted.
    """
    from kervan.bench import servers
    from kervan.cli import render
    from kervan.cli.bench_options import BenchOptions

    given = BenchOptions(**arguments)
    task = _Task(given, render.progress_lines())
    with servers.reach(given.url, task.say) as url:
        status = task.run(url)
    sys.exit(status)


class _Task:
    """One call of the command, with all that was given read before anything is started. Raises: ConfigError."""

    def __init__(self, given: "BenchOptions", say: "Callable[[str], None]") -> None:
        from kervan.bench import benchmark

        self.given, self.say = given, say
        self.loads, self.slo, self.actions = given.loads(), given.slo(), given.timed_actions()
        for load in self.loads:
            self._check(load)
        self.client = benchmark.ClientOptions(processes=given.processes, calibrates=not given.no_calibration)
        self.search = given.rate_search()
        outputs.check_record("--record", given.record)
        outputs.check_file("--html", given.html)
        given.check_servers()

    def _check(self, load: Load) -> None:
        """Raises: ConfigError for a trace that cannot be read, and for commands whose time never comes."""
        if load.trace is not None:
            next(load.arrivals(), None)
        late = next((a for a in self.actions if load.duration_s is not None and a.at_s >= load.duration_s), None)
        if late is not None:
            raise ConfigError(
                f"--at '{late.at_s:g}s {late.command}' is not within the load, which ends after {load.duration_s:g} s; "
                "give an earlier time, or a longer --duration"
            )

    def run(self, url: str) -> int:
        """Measure the server that runs at `url`; the exit status."""
        from kervan.bench import servers

        self.say(f"looking at {url}")
        prepared = self._prepare(url)
        if prepared.probe.complaint:
            self.say(prepared.probe.complaint)
        if self.given.find_rate:
            return self._find_rate(prepared)
        if self.given.against is not None:
            with servers.reach(self.given.against, self.say) as against:
                return self._compare(prepared, against)
        return self._measure(prepared)

    def _prepare(self, url: str, *, model: str | None = None) -> "Prepared":
        from kervan.bench import benchmark

        endpoint = self.given.endpoint(url)
        if model is not None:
            endpoint = replace(endpoint, model=model)
        return benchmark.prepare(endpoint, self.loads[0], tokenizer=self.given.tokenizer)

    # ---- one server

    def _measure(self, prepared: "Prepared") -> int:
        """A run of each load; the exit status."""
        from kervan.bench import benchmark
        from kervan.cli import bench_view, render

        results: list[Result] = []
        for load in self.loads:
            with bench_view.live(load, is_shown=sys.stderr.isatty()) as on_progress:
                result = benchmark.measure(
                    prepared, load, slo=self.slo, client=self.client, actions=self.actions, on_progress=on_progress,
                    say=self.say,
                )  # fmt: skip
            results.append(result)
            if not self.given.as_json:
                bench_view.print_result(result)
            if result.outcome.was_interrupted:
                break
        contents = [result.content() for result in results]
        is_sweep = len(self.loads) > 1
        if self.given.as_json:
            figures = [content["result"] for content in contents]
            render.print_json({"sweep": figures} if is_sweep else figures[0])
        self._record({"sweep": contents} if is_sweep else contents[0])
        self._report(results, contents)
        if not all(result.tally.ok for result in results):
            return 1
        return int(self.given.strict and any(r.doubts() or r.reconciliation.status == "disagrees" for r in results))

    def _report(self, results: "list[Result]", contents: list[dict[str, Any]]) -> None:
        if self.given.html is None:
            return
        from kervan.bench import html_report, records, report_plots

        runs = [
            report_plots.ReportedRun(_name(result.load), records.record("bench", content), result.tally.wholes())
            for result, content in zip(results, contents, strict=True)
        ]
        html_report.write(self.given.html, runs)
        self.say(f"report: {self.given.html}")

    def _record(self, content: dict[str, Any]) -> None:
        if self.given.record is None:
            return
        from kervan.bench import records

        self.say(f"record: {records.write(self.given.record, records.record('bench', content))}")

    def _find_rate(self, prepared: "Prepared") -> int:
        """Search the highest rate; the exit status."""
        from kervan.bench import benchmark
        from kervan.cli import bench_view, render

        load = self.loads[0]
        result = benchmark.find_rate(prepared, load, slo=self.slo, search=self.search, client=self.client, say=self.say)
        content = result.to_dict()
        endpoint = {"url": prepared.endpoint.url, "model": prepared.endpoint.model}
        self._record({"target": endpoint, "load": load.to_dict(), **content})
        if self.given.as_json:
            render.print_json(content)
        else:
            bench_view.print_rate(result)
        return 0 if result.keeps_up_to > 0 else 1

    # ---- two servers

    def _compare(self, prepared: "Prepared", against: str) -> int:
        """Pairs of runs of two servers; the exit status."""
        from kervan.bench import compare
        from kervan.cli import bench_view, render

        sides: dict[Side, Prepared] = {"a": prepared, "b": self._prepare(against, model="")}
        rows, status = [], 0
        for load in self.loads:
            pairs = self._run_pairs(sides, load)
            ratios = compare.ratios(pairs)
            failed = sum(bool(a.tally.num_errors or b.tally.num_errors) for a, b in pairs)
            rows.append(
                {
                    "load": load.to_dict(),
                    "pairs": len(pairs),
                    "pairs_with_errors": failed,
                    "ratios": {ratio.name: ratio.to_dict() for ratio in ratios},
                    "runs": [[a.to_dict(), b.to_dict()] for a, b in pairs],
                }
            )
            if not self.given.as_json:
                bench_view.print_ratios(_name(load), ratios, len(pairs), failed)
            bound = self.given.fail_below
            if not ratios or (bound is not None and compare.worst_shortfall(ratios, bound) is not None):
                status = 1
        content = {"a": sides["a"].endpoint.url, "b": sides["b"].endpoint.url, "comparisons": rows}
        self._record(content)
        if self.given.as_json:
            short = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
            render.print_json({**content, "comparisons": short})
        return status

    def _run_pairs(self, sides: "dict[Side, Prepared]", load: Load) -> "list[tuple[Result, Result]]":
        from kervan.bench import benchmark, client_floor, compare

        floor = client_floor.choose(load.expected_streams) if self.client.calibrates else None

        def measure(side: "Side", pair: int) -> "Result":
            seeded = replace(load, seed=load.seed + 1000 * pair)
            result = benchmark.measure(sides[side], seeded, slo=self.slo, client=self.client, floor=floor)
            self.say(
                f"pair {pair + 1}, {_name(load)}: {side.upper()} {result.out_tok_s:,.1f} tok/s, "
                f"{result.tally.num_errors} failed"
            )
            return result

        return compare.run_pairs(self.given.pairs, measure)


def _name(load: Load) -> str:
    """What the load is, in a few words: in tables, and in the title of a report."""
    if load.streams is not None:
        return plural(load.streams, "stream")
    if load.trace is not None:
        return f"the trace {Path(load.trace).name}"
    (first, *more) = load.stages
    if first.burst and not more:
        return f"a burst of {plural(first.burst, 'request')}"
    if more or first.start_rate != first.end_rate:
        return f"{plural(len(load.stages), 'stage')} of arrivals"
    return f"{first.start_rate:g} requests/s"
