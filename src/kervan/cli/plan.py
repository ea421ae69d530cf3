"""`kervan plan`."""

import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kervan.cli import option_types, options, outputs
from kervan.config.fleet import MAX_GATEWAYS
from kervan.config.workload import DEFAULT_SLO
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kervan.config.workload import Lengths, Slo
    from kervan.facts.architecture import ModelSpec
    from kervan.facts.hardware import Gpu
    from kervan.plan.explain import LayoutPlan
    from kervan.plan.rank import PlannedLayout
    from kervan.plan.request import PlanRequest

DEFAULT_ISL, DEFAULT_OSL = "1024", "256"
SHOWN = 12
NODE_GPUS = 8
LAYOUT_ARGUMENTS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "tp", "pp", "dp",
    "ep",
)  # fmt: skip
SECTIONS = {
    "Machines": "--gpu --gpus --nodes --network --layout",
    "Load": "--isl --osl --trace --rate --concurrency --prefix-hit",
    "Goal": "--slo --goal --price --prices",
    "Model": "--engine-arg --calibration --gateways",
    "Output": "--facts --explain --plot --all --json --help",
}


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("model")
@click.option("--gpu", type=option_types.GPU, help="Kind of GPU, like H200; local: read this machine.")
@click.option(
    "--gpus", type=option_types.GPUS,
    help="GPUs in all. [default: as many as --rate needs; without it 8 per node; local: all]",
)  # fmt: skip
@click.option(
    "--nodes", type=click.IntRange(1, 8192), help="Nodes that the GPUs are on. [default: of 8 GPUs, where they divide]"
)
@click.option("--network", type=float, help="Gbit/s between nodes, for each GPU. [default: 400]")
@click.option("--layout", type=option_types.LAYOUT, help="Only this layout: tp=2,pp=2 (also dp=, ep=, attention_dp=).")
@click.option(
    "--isl", type=option_types.LENGTHS, help=f"Prompt tokens: a number or a distribution. [default: {DEFAULT_ISL}]"
)
@click.option("--osl", type=option_types.LENGTHS, help=f"Output tokens, likewise. [default: {DEFAULT_OSL}]")
@click.option("--trace", type=option_types.FILE, help="Lengths and arrivals of a trace (Azure or Mooncake).")
@click.option(
    "--rate", type=option_types.RATE, help="Requests per second, like 5/s; with --trace, rescales it to that."
)
@click.option("--concurrency", type=option_types.STREAMS, help="Streams of a closed loop, over the whole plan.")
@click.option(
    "--prefix-hit", type=option_types.SHARE, default=0.0, show_default=True,
    help="Share of the prompt tokens that are found in the prefix cache, like 0.6.",
)  # fmt: skip
@click.option(
    "--slo",
    type=option_types.SLO,
    help=f"Bounds on the 99th percentiles. [default: {DEFAULT_SLO} unless a load and --gpus are given]",
)
@click.option(
    "--goal", type=click.Choice(["cost", "throughput", "latency"]), default="cost", show_default=True,
    help="Ranking among layouts that keep the SLO.",
)  # fmt: skip
@click.option("--price", help="US dollars per GPU and hour, like 3.40/h. [default: kervan's price file]")
@click.option("--prices", type=click.Path(path_type=Path), help="Your own price file (docs/hardware.md).")
@click.option("--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="vLLM's argument; repeatable.")
@click.option("--calibration", type=click.Path(path_type=Path), help="A file of kervan calibrate. [default: the prior]")
@click.option(
    "--gateways", type=options.Count(), default="1", show_default=True,
    help="Gateways per replica; of MIN..MAX the most, as under load.",
)  # fmt: skip
@click.option("--facts", is_flag=True, help="Only what MODEL is: sizes, memory per token; needs no --gpu.")
@click.option("--explain", is_flag=True, help="What a step is spent on, in the best layout and the second.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write throughput against latency, as an HTML file.")
@click.option("--all", "show_all", is_flag=True, help=f"Show all layouts, not the best {SHOWN}.")
@options.as_json
def plan(
    model: str, as_json: bool, facts: bool, explain: bool, plot: Path | None, show_all: bool, **given: Any
) -> None:
    """Find the parallelism that serves MODEL best on these GPUs, what it will deliver, what it costs, and why.

    MODEL is a directory with config.json, or that file, or a Hugging Face id, whose config.json is taken from the cache
    or else from the hub. Nothing is started and no GPU is needed.

    Exit status 0 once there is a plan, also one that does not keep the SLO: scripts read keeps_slo of --json. 1: no
    layout fits. 2: wrong usage.
    """
    from kervan.plan import search

    if facts:
        _check_facts_alone()
        _print_facts(model, as_json=as_json)
        return
    if given["gpu"] is None:
        raise ConfigError("a plan needs --gpu, like --gpu H200, or local; `kervan plan --facts MODEL` needs none")
    outputs.check_file("--plot", plot)
    given["engine_args"] = engine_arguments(given["engine_args"])
    given["gateways"] = _frontends(*given["gateways"])
    request = plan_request(model, fixed=given.pop("layout") or {}, **given)
    with _progress():
        layout_plan = search.search(request)
    if Path(model).name == "config.json" and Path(model).is_file():
        model = str(Path(model).parent)  # which kervan up takes
    if plot is not None:
        from kervan.plan import plotting

        plotting.write(layout_plan, plot)
        if not as_json:
            click.echo(f"plot: {plot}", err=True)
    if as_json:
        from kervan.cli import render

        render.print_json(as_dict(layout_plan, model))
        return
    _print(layout_plan, model, show_all=show_all)
    if explain:
        _print_terms(layout_plan)


def _check_facts_alone() -> None:
    """Raises: ConfigError for options beside `--facts` that it would not look at."""
    context = click.get_current_context()
    unused = [
        parameter.opts[-1]
        for parameter in context.command.get_params(context)
        if parameter.param_type_name == "option"
        and parameter.name not in ("facts", "as_json")
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if unused:
        raise ConfigError(
            f"--facts prints what MODEL is and does not use {', '.join(unused)}; leave "
            f"{'it' if len(unused) == 1 else 'them'} out, or --facts for a plan"
        )


def _progress() -> "AbstractContextManager[object]":
    """A line on a terminal while layouts are simulated, which takes seconds."""
    from rich.console import Console

    return Console(stderr=True).status("simulating layouts") if sys.stderr.isatty() else contextlib.nullcontext()


def engine_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """vLLM's arguments by their names, from `KEY=VALUE` texts.

    Raises: ConfigError for those that `--layout` decides.
    """
    arguments = options.engine_arguments(texts)
    for key in arguments:
        if key == "data_parallel_size":
            raise ConfigError(
                f"engine argument {key!r} is a size of the layout; use --layout attention_dp={arguments[key]} for "
                f"ranks that share experts, or dp={arguments[key]} for copies"
            )
        if key in LAYOUT_ARGUMENTS:
            raise ConfigError(f"engine argument {key!r} is a size of the layout; use --layout, for example tp=2,pp=2")
    return arguments


def plan_request(
    model: str,
    *,
    gpu: str,
    gpus: int | None = None,
    nodes: int | None = None,
    network: float | None = None,
    fixed: Mapping[str, int],
    isl: "Lengths | None" = None,
    osl: "Lengths | None" = None,
    trace: Path | None = None,
    rate: float | None = None,
    concurrency: int | None = None,
    prefix_hit: float = 0.0,
    slo: "Slo | None" = None,
    goal: Any = "cost",
    price: str | None = None,
    prices: Path | None = None,
    engine_args: Mapping[str, Any],
    calibration: Path | None = None,
    gateways: int = 1,
) -> "PlanRequest":
    """The request that the options make, in the words of the command line.

    Raises: ConfigError for any that makes no sense.
    """
    from kervan.config import engine_arguments as owned
    from kervan.config.workload import Slo, parse_lengths, parse_slo, read_trace
    from kervan.facts import prices as price_table
    from kervan.plan import calibration as calibrations
    from kervan.plan.request import NETWORK_BYTES_S, PlanRequest
    from kervan.sim import limits as engine_limits

    owned.check_owned(engine_args)
    found_gpu, num_gpus = _gpu(gpu, gpus, nodes or 1)
    if network is not None and not 0 < network < 1e6:
        raise ConfigError(
            f"--network {network:g} is not a number of Gbit/s above 0 and below 1,000,000; write for example "
            "--network 400"
        )
    table = price_table.load(prices)
    own = price_table.parse_price_usd_per_h(price) if price else None
    has_load = rate is not None or concurrency is not None or trace is not None
    counts_gpus = rate is not None and not (gpus or trace or "dp" in fixed or gpu.lower() == "local")
    _check_prompts(trace, isl, osl, prefix_hit)
    spec = model_spec(model)
    engine_limits.check_counted(spec, engine_args)
    return PlanRequest(
        spec=engine_limits.as_served(spec, engine_args),
        gpu=found_gpu,
        gpus=num_gpus,
        nodes=nodes or _usual_nodes(found_gpu, num_gpus),
        counts_gpus=counts_gpus,
        isl=isl or parse_lengths(DEFAULT_ISL),
        osl=osl or parse_lengths(DEFAULT_OSL),
        concurrency=concurrency,
        rate=rate,
        trace=tuple(read_trace(trace)) if trace else (),
        prefix_hit=prefix_hit,
        slo=slo if slo is not None else Slo() if has_load and not counts_gpus else parse_slo(DEFAULT_SLO),
        goal=goal,
        usd_per_gpu_h=own or _price(table, found_gpu.name, "on-demand"),
        spot_usd_per_gpu_h=None if own else _price(table, found_gpu.name, "spot"),
        arguments=engine_args,
        fixed=fixed,
        calibration=calibrations.load(calibration) if calibration else calibrations.PRIOR,
        frontends=gateways,
        network_bytes_s=NETWORK_BYTES_S if network is None else network * 1e9 / 8,
    )


def _frontends(least: int, most: int) -> int:
    """Gateways of each replica under load. Raises: ConfigError for too many."""
    count = most or least or 1
    if not 1 <= count <= MAX_GATEWAYS:
        raise ConfigError(f"--gateways {count} is outside 1..{MAX_GATEWAYS}; write for example --gateways 4")
    return count


def _usual_nodes(gpu: "Gpu", gpus: int) -> int:
    """Nodes of 8 GPUs, where there are more than a node's links join and they divide; else one."""
    is_spread = gpus > max(NODE_GPUS, gpu.link.max_gpus) and gpus % NODE_GPUS == 0
    return gpus // NODE_GPUS if is_spread else 1


def _check_prompts(trace: Path | None, isl: "Lengths | None", osl: "Lengths | None", prefix_hit: float) -> None:
    """Raises: ConfigError for lengths beside a trace that has its own, and for a share that is none."""
    if trace is not None and (isl or osl):
        raise ConfigError(f"--trace {trace} has the lengths of its requests, and --isl or --osl gives others; give one")
    if not 0 <= prefix_hit < 1:
        raise ConfigError(
            f"--prefix-hit {prefix_hit:g} is not a share from 0 to below 1: each prompt has a last token to compute; "
            "write for example --prefix-hit 0.6"
        )


def model_spec(model: str) -> "ModelSpec":
    """What the config.json of MODEL says: a directory, that file, or a Hugging Face id.

    Raises: ConfigError when it cannot be read or counted.
    """
    from kervan.facts import architecture
    from kervan.facts import model as models
    from kervan.observe import hub

    path = Path(model)
    is_file = path.name == "config.json" and path.is_file()
    place = str(path.parent) if is_file else models.resolve(model)
    config = models.read_config(place)
    if config is None:
        if Path(place).exists():  # a GGUF file, or Mistral's own format
            raise ConfigError(
                f"model {model!r} has no config.json, and a plan reads it; give a directory in Hugging Face format"
            )
        config = hub.read_config(model)
    return architecture.parse(config, model if is_file else f"{model}/config.json")


def _gpu(name: str, count: int | None, nodes: int) -> tuple["Gpu", int]:
    from kervan.facts import hardware

    if name.lower() != "local":
        return hardware.gpu(name), count or 8 * nodes
    from kervan.observe import machine

    local = machine.read()
    return local.gpu, count or local.num_gpus * nodes


def _price(table: Any, gpu: str, market: Any) -> float | None:
    from kervan.facts import prices

    price = prices.lookup(gpu, market, table)
    return None if price is None else price.usd_per_gpu_h


def as_dict(plan: "LayoutPlan", model: str) -> dict[str, Any]:
    """The plan for scripts; layouts that do not fit have no figures."""
    from kervan.facts import weight_files
    from kervan.plan import launch

    best = launch.launch(plan.request, plan.best, model)
    return {
        "model": model_dict(plan.request.spec, model),
        "gpu": plan.request.gpu.name,
        "gpus": plan.best.layout.gpus if plan.request.counts_gpus else plan.request.gpus,
        "calibration": plan.request.calibration.name,
        "slo": str(plan.request.slo),
        "candidates": [_row(layout) for layout in plan.layouts],
        "best": 0,
        "keeps_slo": plan.keeps_slo,
        "verdict": plan.verdict,
        "strategies": [dataclasses.asdict(strategy) for strategy in plan.strategies],
        "notes": list(plan.notes),
        "launch": {
            "starts_with": plan.best.layout.starts_with,
            "command": best.command,
            "missing": weight_files.missing_weights(model, plan.request.arguments.get("load_format")),
            "engine_args": dict(best.engine_args),
            "replicas": best.replicas,
            "bundles_per_replica": [dict(bundle) for bundle in best.bundles],
            "target_ongoing_requests": best.target_ongoing_requests,
        },
    }


def model_dict(spec: "ModelSpec", name: str) -> dict[str, Any]:
    """What a model is, for scripts; bytes are those of all weights, and of a token in the KV cache of all layers."""
    return {
        "name": name,
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "active_parameters": spec.active_parameters,
        "kv_bytes_per_token": round(spec.kv_bytes_per_token),
        "weights_bytes": round(spec.weights_bytes),
        "quantization": spec.quantization_name,
        "max_model_len": spec.max_model_len,
        "notes": list(spec.notes),
    }


def _print_facts(model: str, *, as_json: bool) -> None:
    from kervan.cli import render
    from kervan.sim.memory import GIB

    spec = model_spec(model)
    if as_json:
        render.print_json(model_dict(spec, model))
        return
    click.echo(
        f"{model}: {spec.architecture}, {spec.parameters / 1e9:.2f}B parameters, "
        f"{spec.active_parameters / 1e9:.2f}B active per token (without the embedding table); "
        f"{spec.weights_bytes / GIB:.1f} GiB of weights ({spec.quantization_name}); "
        f"{spec.kv_bytes_per_token:,.0f} bytes of KV cache per token; "
        f"up to {spec.max_model_len:,} tokens"
    )
    for note in spec.notes:
        click.echo(note)


def _row(c: "PlannedLayout") -> dict[str, Any]:
    figures: dict[str, Any] = {
        key: round(getattr(c, key), 4)
        for key in (
            "out_tok_s", "requests_s", "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p95_ms",
            "tpot_p99_ms", "e2e_p99_ms", "mean_batch", "served_share", "meets_slo", "score",
        )
    }  # fmt: skip
    prices = {
        key: None if getattr(c, key) is None else round(getattr(c, key), 4)
        for key in ("usd_per_mtok", "usd_per_mtok_spot", "usd_per_mtok_all_in")
    }
    if not c.fits:
        figures = dict.fromkeys(figures) | {"score": 0.0}
        prices = dict.fromkeys(prices)
    size = c.layout
    return {
        "tp": size.tp, "pp": size.pp, "dp": size.dp, "ep": size.ep, "attention_dp": size.attention_dp,
        "gpus": size.gpus,
        "starts_with": size.starts_with,
        "fits": c.fits,
        "kv_tokens": c.memory.kv_tokens,
        "weights_gib_per_gpu": round(c.memory.weights_gib, 2),
        "kv_gib_per_gpu": round(c.memory.kv_gib, 2),
        "concurrency": c.concurrency,
        **figures,
        **prices,
        "binding": c.binding,
        "lever": c.lever,
        "reason": c.reason,
        "band": {key: round(value, 3) for key, value in c.bands.items()},
    }  # fmt: skip


def _print(plan: "LayoutPlan", model: str, *, show_all: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from kervan.facts import prices, weight_files
    from kervan.plan import launch

    q = plan.request
    console = Console(highlight=False, width=None if console_is_wide() else 160)
    console.print(f"[bold]{plan.verdict}[/bold]", soft_wrap=True)
    for note in plan.notes:
        console.print(note, soft_wrap=True, markup=False)
    for strategy in plan.strategies:
        use = "yes" if strategy.use else "no"
        console.print(f"{strategy.name}: {use}; {strategy.reason}", soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "layout",
        "GPUs",
        "streams",
        "tok/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "KV tokens",
        "$/Mtok",
        "SLO",
        "bound by",
    ):
        table.add_column(name, justify="left" if name in ("layout", "bound by") else "right")
    has_slo = bool(str(q.slo))
    rows = plan.layouts if show_all else plan.layouts[:SHOWN]
    if plan.better_elsewhere is not None and plan.better_elsewhere not in rows:
        rows = (*rows, plan.better_elsewhere)
    for c in rows:
        if not c.fits:
            table.add_row(_name(c), str(c.layout.gpus), *[""] * 9, f"does not fit: {c.reason}")
            continue
        table.add_row(
            _name(c), str(c.layout.gpus), str(c.concurrency), _tok_s(c),
            _ms(c.ttft_p50_ms), _ms(c.ttft_p99_ms), _ms(c.tpot_p50_ms), _ms(c.tpot_p99_ms), f"{c.memory.kv_tokens:,}",
            "" if c.usd_per_mtok is None else f"{c.usd_per_mtok:.2f}", f"{c.meets_slo:.0%}" if has_slo else "",
            c.reason or c.binding,
        )  # fmt: skip
    console.print(table)
    if len(rows) < len(plan.layouts):
        console.print(f"{len(plan.layouts) - len(rows)} more with --all", style="dim")
    if plan.best.usd_per_mtok is not None:
        all_in, spot = plan.best.usd_per_mtok_all_in, plan.best.usd_per_mtok_spot
        console.print(
            f"{'best' if plan.keeps_slo else 'nearest'}: {plan.best.usd_per_mtok:.2f} USD per million output tokens at "
            f"{q.usd_per_gpu_h:g} USD per GPU and hour; {all_in:.2f} with a spare replica and daily cold starts"
            + (f"; {spot:.2f} on spot" if spot is not None else ""),
            soft_wrap=True, markup=False,
        )  # fmt: skip
        row = prices.lookup(q.gpu.name)
        if row is not None and row.usd_per_gpu_h == q.usd_per_gpu_h and (warning := row.warning(datetime.date.today())):
            console.print(warning, style="yellow", soft_wrap=True, markup=False)
    console.print(f"constants: {q.calibration.name}; +- and probabilities come from its measured errors", style="dim")
    if not plan.keeps_slo:
        console.print(
            "the next line starts the nearest layout, which does not keep the load or its SLO", style="yellow"
        )
    if missing := weight_files.missing_weights(model, q.arguments.get("load_format")):
        console.print(missing, style="yellow", soft_wrap=True, markup=False)
    console.print(launch.launch(q, plan.best, model).command, soft_wrap=True, markup=False)


def _name(c: "PlannedLayout") -> str:
    """A layout, marked where `kervan up` does not start it."""
    return str(c.layout) if c.layout.starts_with == "kervan up" else f"{c.layout} (vllm serve)"


def console_is_wide() -> bool:
    """Whether output goes to a terminal, whose width counts then."""
    return sys.stdout.isatty()


def _ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _tok_s(c: "PlannedLayout") -> str:
    return f"~{c.out_tok_s:,.0f}" if c.is_rough else f"{c.out_tok_s:,.0f} +-{_percent(c, 'out_tok_s')}"


def _percent(c: "PlannedLayout", key: str) -> str:
    return f"{100 * (c.bands.get(key, 1.0) - 1):.0f}%"


def _print_terms(plan: "LayoutPlan") -> None:
    from rich.console import Console
    from rich.table import Table

    from kervan.plan import explain

    second = next((c for c in plan.layouts[1:] if c.fits), None)
    shown = [plan.best] if second is None else [plan.best, second]
    rows = {c.layout: {name: (d, p) for name, d, p in explain.step_terms(plan, c)} for c in shown}
    names = dict.fromkeys(name for c in shown for name in rows[c.layout])
    table = Table(
        "what",
        box=None,
        pad_edge=False,
        header_style="dim",
        title="where the time of a step goes",
        title_justify="left",
    )
    for c in shown:
        table.add_column(f"{c.layout}: decode, {max(1, round(c.mean_batch))} sequences, ms", justify="right")
        table.add_column("share", justify="right")
        tokens = c.limits.max_num_batched_tokens * c.layout.attention_dp
        table.add_column(f"prefill, {tokens} tokens, ms", justify="right")
        table.add_column("share", justify="right")
    for name in [*names, "sum"]:
        cells = []
        for c in shown:
            for column, digits in ((0, 3), (1, 2)):
                total_ms = sum(row[column] for row in rows[c.layout].values())
                value_ms = total_ms if name == "sum" else rows[c.layout].get(name, (0.0, 0.0))[column]
                cells += [f"{value_ms:.{digits}f}", f"{value_ms / max(1e-9, total_ms):.0%}"]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "sum" else "")
    Console(highlight=False, width=None if console_is_wide() else 160).print(table)
