"""`kervan simulate`."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kervan.bench.arrivals import Process
from kervan.cli import option_types, options, outputs
from kervan.cli.plan import DEFAULT_ISL, DEFAULT_OSL, engine_arguments
from kervan.config.fleet import MAX_GATEWAYS, MAX_REPLICAS, SETTINGS
from kervan.config.workload import DEFAULT_SLO
from kervan.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from kervan.config.autoscale import Autoscaling
    from kervan.config.node_trace import NodeTrace
    from kervan.simulate.compare import Compared
    from kervan.simulate.engine import EngineFacts
    from kervan.simulate.market import MarketModel
    from kervan.simulate.replica_rate import ReplicaRate
    from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup

DEFAULT_START = "90s"
DEFAULT_POLICY = "slo"
DURATION_S = 600.0
MAX_SEEDS = 1000
REPLICAS_PER_GATEWAY = 4
LONG_LOAD_S, LONG_EVERY_S = 6 * 3600.0, 5.0
TP_SIZES = (1, 2, 4, 8, 16)
SECTIONS = {
    "Replicas": "--model --gpu --layout --engine-arg --calibration --replica-rate --start-time --min --max --pool",
    "Load": "--ramp --rate --duration --trace --trace-speed --arrivals --burstiness --isl --osl",
    "Policy": "--policy --slo --schedule --time-zone --autoscaling --decide-every",
    "What happens": "--spot --notice --losses --price --prices --gateways --routing --max-queued-streams "
    "--hold-timeout",
    "Runs": "--seed --seeds --processes",
    "Output": "--json --html --help",
}

option = click.option
DISTRIBUTION = option_types.DURATIONS


def policy_names(text: str, option: str = "--policy") -> list[str]:
    """Raises: ConfigError for one that is unknown, or given twice."""
    from kervan.simulate import policies

    names = [name.strip() for name in text.split(",")]
    for name in names:
        policies.check(name)
        if names.count(name) > 1:
            raise ConfigError(f"{option} {text!r} names {name} twice; give each once")
    return names


class PolicyNames(click.ParamType):  # type: ignore[type-arg]
    """Policies of the simulator, joined by commas: those of the fleet's settings, and some that only it has."""

    name = "name,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Raises: ConfigError for one that is unknown, or given twice."""
        return policy_names(value) if isinstance(value, str) else list(value)  # type: ignore[call-overload]


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("positional", metavar="[MODEL]", required=False)
@option("--model", help="The model: a directory with config.json, or a Hugging Face id; also as an argument.")
@option("--gpu", type=option_types.GPU, help="Kind of GPU, like H200; required.")
@option("--layout", type=option_types.LAYOUT, help="Of a replica: tp=2, also ep=. [default: the least tp that fits]")
@option("--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="vLLM's argument; repeatable.")
@option("--calibration", type=option_types.FILE, help="A file of kervan calibrate. [default: the prior]")
@option(
    "--replica-rate", type=option_types.RATE,
    help="Scale step times so that a replica keeps the SLO up to this rate, like 1.45/s.",
)  # fmt: skip
@option(
    "--start-time", type=DISTRIBUTION, default=DEFAULT_START, show_default=True,
    help="From a decision to a ready replica: 100s, 60s..140s, lognormal:median=90s,sigma=0.3 or 80s@0.7,200s@0.3.",
)  # fmt: skip
@option("--min", "minimum", type=click.IntRange(0, MAX_REPLICAS), help="Least replicas. [default: 1]")
@option("--max", "maximum", type=click.IntRange(1, MAX_REPLICAS), help="Most replicas. [default: 8, or the least]")
@options.pools
@option("--ramp", help="Steps of requests/s: 2:330s,4:360s; also as bench --stages: 2..10@1min, burst:100.")
@option("--rate", type=option_types.RATE, help="Requests per second for --duration.")
@option("--duration", type=option_types.DURATION, help=f"Of --rate. [default: {DURATION_S:g}s]")
@option("--trace", type=option_types.FILE, help="Arrivals and lengths of a trace (Azure or Mooncake).")
@option("--trace-speed", type=option_types.FACTOR, default="1", show_default=True, help="How many times as fast.")
@option(
    "--arrivals", type=click.Choice(get_args(Process)), default="poisson", show_default=True,
    help="Of a ramp or a rate.",
)  # fmt: skip
@option(
    "--burstiness",
    type=option_types.NUMBER,
    default=1.0,
    help="Shape of gamma arrivals: 1 is Poisson, less is burstier.",
)
@option("--isl", type=option_types.LENGTHS, help=f"Prompt tokens: a number or a distribution. [default: {DEFAULT_ISL}]")
@option("--osl", type=option_types.LENGTHS, help=f"Output tokens, likewise. [default: {DEFAULT_OSL}]")
@option(
    "--policy", type=PolicyNames(), default=DEFAULT_POLICY, show_default=True,
    help="One, or several to compare, like slo,ray:16,fixed:8 (docs/simulator.md has all).",
)  # fmt: skip
@option("--slo", type=option_types.SLO, help=f"What a good request keeps. [default: {DEFAULT_SLO}]")
@option(
    "--routing", type=click.Choice(["prefix", "least-load"]), default="prefix", show_default=True,
    help="As of kervan up; they differ where a trace says what prompts share (Mooncake's).",
)  # fmt: skip
@option(
    "--decide-every", type=option_types.DURATION,
    help=f"Between two decisions. [default: 1s; {LONG_EVERY_S:g}s in loads of more than {LONG_LOAD_S / 3600:g} h]",
)  # fmt: skip
@option("--schedule", multiple=True, help="Minimum by the hour, like 'mon-fri 08:00 min=4'; repeatable.")
@option("--time-zone", default="UTC", show_default=True, help="Of --schedule; the simulation begins on Monday, 0:00.")
@option("--autoscaling", multiple=True, metavar="KEY=VALUE", help="A parameter of Ray Serve's autoscaling; repeatable.")
@option(
    "--spot", help="When spot nodes come and go: a node trace, or a market like zones=3,nodes=4 (docs/simulator.md)."
)
@option(
    "--notice", type=option_types.DURATION, default="120s", show_default=True,
    help="From a cloud's notice until its spot node goes; 0: none.",
)  # fmt: skip
@option(
    "--losses", type=option_types.LOSS_RATE, help="Of one on-demand replica, without notice: 0.01/h. [default: none]"
)
@option("--price", help="US dollars per GPU and hour, like 3.40/h. [default: kervan's price file]")
@option("--prices", type=option_types.FILE, help="Your own price file (docs/hardware.md).")
@option(
    "--gateways", type=options.Count(),
    help=f"HTTP gateways, a fixed number. [default: one for each {REPLICAS_PER_GATEWAY} replicas of the most]",
)  # fmt: skip
@option(
    "--max-queued-streams", type=click.IntRange(0, 10**9), default=SETTINGS["max_queued_streams"].default,
    show_default=True, help="Streams that may queue beyond what the replicas run at once.",
)  # fmt: skip
@option(
    "--hold-timeout", type=option_types.DURATION, default=f"{SETTINGS['hold_timeout_s'].default:g}s",
    show_default=True, help="How long a stream waits for a replica before it fails.",
)  # fmt: skip
@option("--seed", type=int, default=0, show_default=True, help="Same seed, same result.")
@option(
    "--seeds", "num_seeds", type=click.IntRange(1, MAX_SEEDS), default=1, show_default=True,
    help="So many seeds, from --seed on: means, with intervals.",
)  # fmt: skip
@option("--processes", type=click.IntRange(1, 1024), help="At once. [default: one per core]")
@option("--html", type=option_types.FILE, help="Write load, replicas and times to the first token as an HTML file.")
@options.as_json
def simulate(as_json: bool, html: Path | None, **given: Any) -> None:
    """Run a fleet on a virtual clock under a load, with the policies that the live fleet uses.

    Nothing is started and no GPU is needed. The same options and seed give the same result.

    Exit status 0 when the runs are over, whatever came of them; 2: wrong usage.
    """
    from kervan.simulate import compare

    outputs.check_file("--html", html)
    names = given["policy"]
    with _progress(is_shown=sys.stderr.isatty()) as say:
        setup, rate, notes = fleet_setup(given, say)
        seeds = range(given["seed"], given["seed"] + given["num_seeds"])
        say(f"0 of {len(seeds) * len(names)} runs")
        compared = compare.run(
            setup, names, seeds, processes=given["processes"] or 0,
            on_done=lambda done, total: say(f"{done} of {total} runs"),
        )  # fmt: skip
    if html is not None:
        from kervan.simulate import html_report

        html_report.write(html, setup, compared, notes)
        if not as_json:
            click.echo(f"report: {html}", err=True)
    if as_json:
        from kervan.cli import render

        render.print_json(as_dict(compared, given["seed"], rate, notes))
        return
    from kervan.cli import simulate_view

    simulate_view.print_compared(setup, compared, rate, notes)


def as_dict(compared: "list[Compared]", seed: int, rate: "ReplicaRate | None", notes: "list[str]") -> dict[str, Any]:
    """The runs for scripts. `events_per_s`, of computing, is the one figure that differs from run to run."""
    outcomes = [outcome for one in compared for outcome in one.outcomes]
    result: dict[str, Any] = {
        "policies": [one.as_dict() for one in compared],
        "events_per_s": round(sum(o.events for o in outcomes) / max(1e-9, sum(o.computed_s for o in outcomes))),
        "seed": seed,
        "notes": notes,
    }
    if rate is not None:
        result["replica_rate"] = {
            "requests_per_s": rate.rate_per_s,
            "unscaled_requests_per_s": round(rate.unscaled_per_s, 4),
            "step_time_scale": round(rate.scale, 5),
        }
    return result


def _num_gateways(count: tuple[int, int] | None) -> int:
    """0 for as many as the replicas need. Raises: ConfigError for a range, and for more than a fleet has."""
    least, most = count or (0, 0)
    if most:
        raise ConfigError(f"--gateways {least}..{most}: a simulated fleet has a fixed number; write --gateways {most}")
    if least > MAX_GATEWAYS:
        raise ConfigError(f"--gateways {least} is above {MAX_GATEWAYS}; give at most that many")
    return least


def fleet_setup(
    given: dict[str, Any], say: Callable[[str], None] = lambda _: None
) -> "tuple[FleetSetup, ReplicaRate | None, list[str]]":
    """The fleet and its load of the options, what `--replica-rate` made of it, and what the user should know.

    Raises: ConfigError for values that make no sense; CapacityError for a model that does not fit.
    """
    from kervan.config.workload import parse_slo
    from kervan.simulate import replica_rate
    from kervan.simulate.setup import FleetSetup

    model = given["model"] or given["positional"]
    if given["model"] and given["positional"]:
        raise ConfigError(
            f"the model is given twice, as {given['positional']} and as --model {given['model']}; give it once"
        )
    if model is None:
        raise ConfigError("a simulation needs a model: --model DIR, a directory with config.json")
    if given["gpu"] is None:
        raise ConfigError("a simulation needs --gpu, like --gpu H200")
    if given["gpu"] == "local":
        raise ConfigError("--gpu local reads this machine, and a simulation is of other ones; name a GPU like H200")
    notes: list[str] = []
    load = _load(given)
    arguments = engine_arguments(given["engine_args"])
    engine, usd, spot_usd = _engine(model, given, load, arguments, notes)
    pools = _pools(given, usd, spot_usd, notes)
    most = sum(pool.maximum for pool in pools)
    setup = FleetSetup(
        engine=engine,
        pools=pools,
        load=load,
        routing=given["routing"],
        caches_prefixes=str(arguments.get("enable_prefix_caching")).lower() not in ("false", "0"),
        slo=given["slo"] or parse_slo(DEFAULT_SLO),
        autoscaling=_autoscaling(given, most, notes),
        decides_every_s=given["decide_every"] or (LONG_EVERY_S if load.duration_s > LONG_LOAD_S else 1.0),
        gateways=_num_gateways(given["gateways"]) or min(MAX_GATEWAYS, -(-most // REPLICAS_PER_GATEWAY)),
        max_queued_streams=given["max_queued_streams"],
        hold_timeout_s=given["hold_timeout"],
        notice_s=given["notice"],
        losses_per_hour=3600 * (given["losses"] or 0.0),
    )
    if not 0.1 <= setup.decides_every_s <= 600:
        raise ConfigError(f"--decide-every {setup.decides_every_s:g}s is not from 0.1 s to 10 min; write 1s, as live")
    rate = None
    if given["replica_rate"] is not None:
        say(f"scaling step times to {given['replica_rate']:g} requests/s per replica")
        import dataclasses

        rate = replica_rate.scaled_to(setup, given["replica_rate"])
        setup = dataclasses.replace(setup, engine=engine.scaled(rate.scale))
        notes.append(replica_rate.words(rate, setup.slo))
    return setup, rate, notes


def _autoscaling(given: dict[str, Any], most: int, notes: list[str]) -> "Autoscaling":
    from kervan.config import autoscale

    parameters = [options.parse_assignment(text, "--autoscaling") for text in given["autoscaling"]]
    names = [name for name, _ in parameters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--autoscaling gives {twice[0]} twice; give it once")
    asked = autoscale.resolve(
        policy="", slo="", schedule=given["schedule"], time_zone=given["time_zone"], autoscaling=dict(parameters),
        maximum=most,
    )  # fmt: skip
    notes += asked.warnings if "ray" in given["policy"] else ()
    return asked


def _load(given: dict[str, Any]) -> "LoadSetup":
    from kervan.bench.arrivals import Stage, steady
    from kervan.config.workload import parse_lengths, read_trace
    from kervan.simulate import loads
    from kervan.simulate.setup import LoadSetup

    kinds = [name for name in ("ramp", "rate", "trace") if given[name] is not None]
    if len(kinds) != 1:
        what = f"--{' and --'.join(kinds)} are {len(kinds)} loads" if kinds else "there is no load"
        raise ConfigError(f"{what}; give one of --ramp 2:330s,4:360s, --rate 5/s and --trace FILE")
    if given["duration"] is not None and given["rate"] is None:
        raise ConfigError(f"--duration {given['duration']:g}s is of --rate, and --{kinds[0]} has its own; leave it out")
    if given["trace"] is not None:
        if given["isl"] or given["osl"]:
            raise ConfigError(
                f"--trace {given['trace']} has the lengths of its requests, and --isl or --osl gives others; give one"
            )
        rows = tuple(read_trace(given["trace"]))
        loads.check_trace(rows, given["trace_speed"], f"--trace {given['trace']}")
        return LoadSetup(trace=rows, trace_speed=given["trace_speed"], process=given["arrivals"])
    if given["trace_speed"] != 1:
        raise ConfigError(f"--trace-speed {given['trace_speed']:g} is of a --trace, and there is none; leave it out")
    if given["arrivals"] == "gamma" and not 0 < given["burstiness"] < 1e6:
        raise ConfigError(f"--burstiness {given['burstiness']:g} is not above 0; write for example --burstiness 0.5")
    stages: tuple[Stage, ...]
    if given["ramp"] is not None:
        stages = loads.parse_ramp(given["ramp"])
    else:
        duration_s = DURATION_S if given["duration"] is None else given["duration"]
        if duration_s <= 0:
            raise ConfigError(f"--duration {duration_s:g}s lasts no time; give a duration above 0")
        stages = steady(given["rate"], duration_s)
        loads.check_size(stages, f"--rate {given['rate']:g}/s for {duration_s:g} s")
    return LoadSetup(
        stages=stages,
        process=given["arrivals"],
        burstiness=given["burstiness"],
        isl=given["isl"] or parse_lengths(DEFAULT_ISL),
        osl=given["osl"] or parse_lengths(DEFAULT_OSL),
    )


def _engine(
    model: str, given: dict[str, Any], load: "LoadSetup", arguments: dict[str, Any], notes: list[str]
) -> "tuple[EngineFacts, float | None, float | None]":
    """What a replica is, and its dollars per hour, on demand and spot."""
    from kervan.cli.plan import plan_request
    from kervan.plan import load as plan_load
    from kervan.plan import screen
    from kervan.simulate.engine import EngineFacts

    fixed = dict(given["layout"] or {})
    for size in ("pp", "dp", "attention_dp"):
        if fixed.get(size, 1) > 1:
            why = "--max says how many replicas there are" if size == "dp" else "one stage and one rank are simulated"
            raise ConfigError(
                f"--layout {size}={fixed[size]}: {why}; write for example --layout tp={fixed.get('tp', 2)}"
            )
    reason = ""
    for tp in (fixed["tp"],) if "tp" in fixed else TP_SIZES:
        sizes = {**fixed, "tp": tp}
        request = plan_request(
            model, gpu=given["gpu"], gpus=tp, fixed=sizes, isl=load.isl, osl=load.osl, trace=given["trace"],
            rate=1.0, engine_args=arguments, calibration=given["calibration"], price=given["price"],
            prices=given["prices"],
        )  # fmt: skip
        try:
            (screened,) = screen.screen(plan_load.load(request))
        except ConfigError:
            if tp == TP_SIZES[0] or "tp" in fixed:
                raise
            break  # the model cannot be cut any further
        if screened.fits:
            break
        reason = reason or screened.reason
    else:
        raise CapacityError(f"{model} does not fit on {tp} {request.gpu.name}: {reason}; use a larger --layout tp=")
    if not screened.fits:
        raise CapacityError(f"{model} does not fit on a {request.gpu.name}: {reason}; use another --gpu")
    times, gpus = screened.step_time, screened.replica.gpus_per_replica
    if "tp" not in fixed:
        notes.append(f"a replica is TP{tp}, the least that fits; --layout tp= gives another")
    engine = EngineFacts.of(times, screened.memory.kv_tokens)
    usd, spot = request.usd_per_gpu_h, request.spot_usd_per_gpu_h
    return engine, None if usd is None else usd * gpus, None if spot is None else spot * gpus


def _pools(
    given: dict[str, Any], usd: float | None, spot_usd: float | None, notes: list[str]
) -> "tuple[PoolSetup, ...]":
    from kervan.config import node_trace
    from kervan.config.fleet import parse_bounds
    from kervan.facts.markets import MARKETS, ON_DEMAND, SPOT
    from kervan.simulate.market import parse_market
    from kervan.simulate.setup import PoolSetup

    named = options.pool_settings(given["pools"]).get("pools", {})
    if named and (given["minimum"] is not None or given["maximum"] is not None):
        raise ConfigError("--min and --max are of a fleet without --pool; give the bounds there, like --pool spot:0..6")
    nodes: NodeTrace | MarketModel | None = None
    if given["spot"] is not None:
        is_market = "=" in given["spot"] and not Path(given["spot"]).exists()
        nodes = parse_market(given["spot"]) if is_market else node_trace.read(Path(given["spot"]))
    if not named:
        least = 1 if given["minimum"] is None else given["minimum"]
        most = max(8, least) if given["maximum"] is None else given["maximum"]
        if most < least:
            raise ConfigError(f"--min {least} is above --max {most}; write --min {most} --max {least}")
        named = {ON_DEMAND: f"{least}..{most}"}
        if nodes is not None:
            named = {ON_DEMAND: f"{least}..{most}", SPOT: f"0..{most}"}
            notes.append(f"--spot makes two pools, on-demand:{least}..{most} and spot:0..{most}; --pool gives others")
    for name in named:
        if name not in MARKETS:
            raise ConfigError(f"pool {name!r} is not one of {', '.join(MARKETS)}; write for example --pool spot:0..6")
    if nodes is not None and SPOT not in named:
        raise ConfigError(f"--spot {given['spot']} is of spot nodes, and there is no spot pool; add --pool spot:0..6")
    bounds = {name: parse_bounds(name, named[name]) for name in MARKETS if name in named}
    if not any(one.maximum for one in bounds.values()):
        raise ConfigError("all pools have room for 0 replicas; give one more, for example --pool on-demand:1")
    pools = []
    for name, one in bounds.items():
        dollars = spot_usd if name == SPOT else usd
        if name == SPOT and dollars is None:
            dollars = usd
            notes.append("no spot price is known for this GPU: spot replicas cost as much as on-demand ones")
        pools.append(
            PoolSetup(
                name=name,
                minimum=one.minimum,
                maximum=one.maximum,
                usd_per_hour=dollars,
                start=given["start_time"],
                nodes=nodes if name == SPOT else None,
            )
        )
    if usd is None:
        notes.append("no price is known for this GPU: there are no dollars; give --price 3.40/h")
    return tuple(pools)


@contextlib.contextmanager
def _progress(*, is_shown: bool) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is computed."""
    if not is_shown:
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("simulating") as status:
        yield lambda text: status.update(f"simulating: {text}")
