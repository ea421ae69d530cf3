"""`kervan cluster`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kervan.cli import option_types, options, outputs
from kervan.cluster.clouds import CloudName
from kervan.cluster.request import EXTRAS, LAUNCHERS, TARGETS
from kervan.config import fleet as fleets
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from kervan.cluster.cost import Compared, MarketSetup, Mix, Prices
    from kervan.cluster.render import Rendered
    from kervan.cluster.request import Machine, Zone
    from kervan.config.fleet import FleetConfig

CPUS_PER_GPU, MEMORY_GIB_PER_GPU = 8, 64
DEFAULT_DAYS, DEFAULT_SEEDS = 14.0, 5
DEFAULT_START = "5min"
AVAILABILITIES = (0.3, 0.5, 0.7, 0.9, 0.97)
CLAIMED_SAVING = 0.65
RENDER_SECTIONS = {
    "Fleet": "--config --name --tp --pp --replicas --pool",
    "Files": "--target --out --image --with",
    "Machines": "--instance --gpus-per-node --cpus-per-node --memory-per-node",
    "Cloud": "--cloud --region --zone --project",
    "Kubernetes and Slurm": "--namespace --partition --time-limit",
    "Output": "--json --help",
}
COST_SECTIONS = {
    "Nodes": "--pool --gpu --gpus-per-node",
    "Prices": "--price --spot-price --prices",
    "Market": "--spot --start-time --days --seed --seeds",
    "Output": "--json --help",
}
# What only some targets read.
OF_TARGETS = {
    "image": ("kuberay", "compose", *LAUNCHERS),
    "extras": ("kuberay", "compose"),
    "cloud": ("kuberay",),
    "region": tuple(LAUNCHERS),
    "zones": ("kuberay", *LAUNCHERS),
    "project": ("ray-gcp",),
    "namespace": ("kuberay",),
    "partition": ("slurm",),
    "time_limit": ("slurm",),
}
OPTION_OF = {"extras": "with", "zones": "zone"}


def _gib(text: str, option: str) -> int:
    """Whole GiB. Raises: ConfigError for less than one."""
    from kervan.units import parse_bytes

    size = parse_bytes(text, option) >> 30
    if not size:
        raise ConfigError(f"{option} {text!r} is below 1 GiB; write for example {option} 512GiB")
    return size


@click.group()
def cluster() -> None:
    """Write the files that start a fleet on a cluster, and say what its nodes cost."""


@cluster.command(cls=options.sectioned(RENDER_SECTIONS), short_help="Write a fleet's files for Kubernetes and others.")
@click.argument("model", required=False)
@click.option("--config", "config_path", type=option_types.FILE, help="The fleet: the file that kervan up takes.")
@options.name
@options.setting("--tp")
@options.setting("--pp")
@options.setting("--replicas", type=options.Count())
@options.pools
@click.option("--target", type=click.Choice(TARGETS), required=True, help="What starts the nodes.")
@click.option("--out", type=option_types.FILE, required=True, help="Directory for the files; made if it is not there.")
@click.option("--image", help="Container image with an exact tag or digest (docs/deploy.md builds it).")
@click.option("--with", "extras", type=option_types.choices(EXTRAS), help=f"{' and '.join(EXTRAS)}, joined by commas.")
@click.option("--instance", help="The cloud's name of a machine with GPUs, like p5.48xlarge.")
@click.option(
    "--gpus-per-node", type=click.IntRange(0, 64), help="[default: those of --instance, or tp*pp of the fleet]"
)
@click.option("--cpus-per-node", type=click.IntRange(1, 4096), help=f"[default: {CPUS_PER_GPU} for each GPU]")
@click.option(
    "--memory-per-node", type=option_types.Parsed("bytes", _gib),
    help=f"[default: {MEMORY_GIB_PER_GPU} GiB for each GPU]",
)  # fmt: skip
@click.option(
    "--cloud",
    type=click.Choice(get_args(CloudName)),
    help="Of a Kubernetes cluster: labels and notices. [default: none]",
)
@click.option("--region", help="Like us-west-2; for Azure a location like westus2.")
@click.option(
    "--zone", "zones", multiple=True, help="Where nodes may be, repeatable; on AWS with a subnet: us-west-2a=subnet-0a."
)
@click.option("--project", help="Of Google Cloud.")
@click.option("--namespace", help="Of Kubernetes. [default: default]")
@click.option("--partition", help="Of Slurm.")
@click.option("--time-limit", type=option_types.DURATION, help="Of the Slurm job. [default: 24h]")
@options.as_json
def render(**given: Any) -> None:
    """Write the files that start the fleet of MODEL, or of --config, on a cluster to come.

    Nothing is started, and no file has a secret in it. What to do with the files is printed.
    """
    from kervan.cluster import render as rendering

    out: Path = given["out"]
    _check_meant(given)
    rendered = rendering.render(_request(given))
    outputs.write_files("--out", out, rendered.files)
    if given["as_json"]:
        from kervan.cli.render import print_json

        print_json({"out": str(out), **rendered.to_dict()})
        return
    _print_rendered(out, rendered)


def _check_meant(given: dict[str, Any]) -> None:
    """Raises: ConfigError for an option that the target does not read."""
    for name, targets in OF_TARGETS.items():
        if given[name] not in (None, ()) and given["target"] not in targets:
            option = OPTION_OF.get(name, name).replace("_", "-")
            raise ConfigError(
                f"--{option} is of --target {', '.join(targets)}, and the target is {given['target']}; leave it out"
            )


def _request(given: dict[str, Any]) -> Any:
    from kervan.cluster.request import RenderRequest, check_partition

    fleet = _fleet(given)
    if given["partition"] is not None:
        check_partition(given["partition"])  # an empty one too, which a request takes for none
    defaults = {
        "region": given["region"],
        "project": given["project"],
        "namespace": given["namespace"],
        "partition": given["partition"],
        "cloud_name": given["cloud"],
        "image": given["image"],
    }
    if (limit_s := given["time_limit"]) is not None:
        if limit_s < 60:
            raise ConfigError(f"--time-limit {limit_s:g}s is below a minute; write for example --time-limit 24h")
        defaults["time_limit_min"] = round(limit_s / 60)
    return RenderRequest(
        target=given["target"],
        fleet=fleet,
        machine=_machine(given, fleet),
        zones=tuple(_zone(text) for text in given["zones"]),
        extras=frozenset(given["extras"] or ()),
        **{name: value for name, value in defaults.items() if value is not None},
    )


def _fleet(given: dict[str, Any]) -> "FleetConfig":
    """The file's settings, overridden by the options. Raises: ConfigError."""
    path = given["config_path"]
    settings = fleets.load_file(path) if path is not None else {}
    if given["name"] != options.DEFAULT_NAME or "name" not in settings:
        settings["name"] = given["name"]
    if pools := options.pool_settings(given["pools"]):
        if given["replicas"] is not None:
            raise ConfigError("--replicas and --pool both set the number of replicas; give only the pools")
        settings |= pools
        settings.pop("replicas", None)
        settings.pop("max_replicas", None)
    settings |= options.replica_settings(given["replicas"])
    settings |= {key: given[key] for key in ("model", "tp", "pp") if given[key] is not None}
    return fleets.from_mapping(settings, f"config file {path}" if path is not None else "kervan cluster render")


def _machine(given: dict[str, Any], fleet: "FleetConfig") -> "Machine":
    """What is said of a node, what the table of machines knows, and else what the fleet needs."""
    from kervan.cluster.request import Machine
    from kervan.facts import instances

    name = given["instance"] or ""
    known = instances.INSTANCES.get(name)
    gpus = given["gpus_per_node"]
    if known is not None and gpus not in (None, known.num_gpus):
        raise ConfigError(
            f"--gpus-per-node {gpus}: a {name} has {known.num_gpus} GPUs; leave --gpus-per-node out, or use another "
            "--instance"
        )
    if gpus is None and known is not None:
        gpus = known.num_gpus
    if gpus is None and name:
        raise ConfigError(
            f"--instance {name} is not in the table of machines, so its GPUs are not known; add --gpus-per-node"
        )
    if gpus is None:
        has_none = fleet.device == "CPU" or fleet.engine == "twin"
        gpus = 0 if has_none else fleet.world_size // max(1, fleet.nodes_per_replica)
    return Machine(
        instance=name,
        gpus=gpus,
        cpus=given["cpus_per_node"] or CPUS_PER_GPU * max(1, gpus),
        memory_gib=given["memory_per_node"] or MEMORY_GIB_PER_GPU * max(1, gpus),
    )


def _zone(text: str) -> "Zone":
    from kervan.cluster.request import Zone

    name, equals, subnet = text.partition("=")
    if not name.strip() or (equals and not subnet.strip()):
        raise ConfigError(f"--zone {text!r} names none; write --zone us-west-2a, on AWS --zone us-west-2a=subnet-0a")
    return Zone(name.strip(), subnet.strip())


def _print_rendered(out: Path, rendered: "Rendered") -> None:
    request = rendered.request
    for group in request.groups:
        count = str(group.least) if group.least == group.most else f"{group.least}..{group.most}"
        each = f"{request.machine.gpus} GPU{'s' * (request.machine.gpus != 1)}" if request.machine.gpus else "no GPU"
        grace = request.grace(group.market)
        nodes = f"{count} node{'s' * (count != '1')} with {each}"
        click.echo(f"{group.market}: {nodes}; {grace.drain_s} s to drain, {grace.period_s} s to end")
    for note in rendered.notes:
        click.echo(f"note: {note}")
    for name in rendered.files:
        click.echo(f"wrote {out / name}")
    click.echo("then:")
    for step in rendered.steps:
        click.echo(f"  {step.replace('DIR', str(out))}")


# ---- cost


@cluster.command(cls=options.sectioned(COST_SECTIONS), short_help="Compare nodes on demand, spot, and both.")
@click.option(
    "--pool", "pools", multiple=True, metavar="NAME:COUNT",
    help="Nodes by market: on-demand:2, spot:6; on-demand:2..8 covers missing spot. [default: those two]",
)  # fmt: skip
@click.option("--gpu", type=option_types.GPU, help="Kind of GPU, for its prices in kervan's price file.")
@click.option("--gpus-per-node", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--price", help="US dollars per GPU and hour on demand, like 4/h. [default: the price file's]")
@click.option("--spot-price", help="Likewise spot; several joined by commas: 1/h,1.5/h. [default: the price file's]")
@click.option("--prices", type=option_types.FILE, help="Your own price file (docs/hardware.md).")
@click.option(
    "--spot", help="The market, as for kervan simulate. [default: zones=3, each with the spot nodes that are wanted]"
)
@click.option(
    "--start-time", type=option_types.DURATION, default=DEFAULT_START, show_default=True,
    help="From a node to a ready replica.",
)  # fmt: skip
@click.option(
    "--days", type=option_types.NumberRange(0.1, 365), default=DEFAULT_DAYS, show_default=True, help="Of the market."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same result.")
@click.option(
    "--seeds", "num_seeds", type=click.IntRange(1, 1000), default=DEFAULT_SEEDS, show_default=True,
    help="Courses of the market, from --seed on.",
)  # fmt: skip
@options.as_json
def cost(**given: Any) -> None:
    """Say what nodes cost on demand, spot, and mixed, in the simulator's spot market.

    A saving is against as many nodes on demand: as quoted, with spot always there; as paid; and for each node that
    served.
    """
    from kervan.cluster import cost as costs
    from kervan.cluster.cost import MarketSetup
    from kervan.simulate.market import parse_market

    notes: list[str] = []
    mix = _mix(given["pools"])
    prices = _node_prices(given, notes)
    market = costs.market_for(mix) if given["spot"] is None else parse_market(given["spot"])
    setup = MarketSetup(market=market, duration_s=given["days"] * 86_400, start_s=given["start_time"])
    seeds = range(given["seed"], given["seed"] + given["num_seeds"])
    with _progress() as say:
        say("mixes")
        compared = costs.compare(costs.around(mix), prices, setup, seeds)
        say("availability")
        curve = costs.availability_curve(costs.covered(mix), prices, setup, seeds, AVAILABILITIES)
    if given["as_json"]:
        from kervan.cli.render import print_json

        print_json(_cost_dict(setup, compared, curve, notes))
        return
    _print_costs(mix, setup, compared, curve, notes)


def _mix(given: tuple[str, ...]) -> "Mix":
    """Raises: ConfigError for pools that are none, or have no spot."""
    from kervan.cluster.cost import Mix
    from kervan.config.fleet import PoolBounds, parse_bounds
    from kervan.facts.markets import MARKETS, ON_DEMAND, SPOT

    named = options.pool_settings(given or ("on-demand:2", "spot:6"))["pools"]
    for name in named:
        if name not in MARKETS:
            raise ConfigError(f"pool {name!r} is not one of {', '.join(MARKETS)}; write for example --pool spot:6")
    none = PoolBounds(0, 0)
    on_demand = parse_bounds(ON_DEMAND, named[ON_DEMAND]) if ON_DEMAND in named else none
    spot = parse_bounds(SPOT, named[SPOT]) if SPOT in named else none
    if not spot.maximum:
        raise ConfigError("there is no spot node to compare with; write for example --pool on-demand:2 --pool spot:6")
    return Mix(on_demand, PoolBounds(spot.maximum, spot.maximum))


def _node_prices(given: dict[str, Any], notes: list[str]) -> "list[Prices]":
    """Of a node, for each spot price. Raises: ConfigError where one is not known."""
    import datetime

    from kervan.cluster.cost import Prices
    from kervan.facts import prices as facts

    listed = facts.load(given["prices"]) if given["prices"] is not None else None
    found: dict[str, list[float]] = {}
    for market, option in (("on-demand", "price"), ("spot", "spot_price")):
        if given[option] is not None:
            found[market] = [facts.parse_price_usd_per_h(part) for part in given[option].split(",")]
            continue
        name = option.replace("_", "-")
        if given["gpu"] in (None, "local"):
            raise ConfigError(f"there is no {market} price; give --gpu, like --gpu H200, or --{name} 4/h")
        price = facts.lookup(given["gpu"], market, listed)  # type: ignore[arg-type]  # a literal of the table above
        if price is None:
            raise ConfigError(f"no {market} price of {given['gpu']} is known; give one, like --{name} 1.50/h")
        found[market] = [price.usd_per_gpu_h]
        notes.append(f"{market}: {price.usd_per_gpu_h:g} USD per GPU and hour, {price}")
        if old := price.warning(datetime.datetime.now(tz=datetime.UTC).date()):
            notes.append(old)
    if len(found["on-demand"]) > 1:
        raise ConfigError(f"--price {given['price']!r} names {len(found['on-demand'])} prices; give one")
    gpus, usd = given["gpus_per_node"], found["on-demand"][0]
    return [Prices(usd * gpus, spot_usd * gpus) for spot_usd in found["spot"]]


def _progress() -> Any:
    import sys

    from kervan.cli.simulate import _progress as progress

    return progress(is_shown=sys.stderr.isatty())


def _cost_dict(
    setup: "MarketSetup",
    compared: "list[Compared]",
    curve: "list[tuple[float, list[Compared]]]",
    notes: list[str],
) -> dict[str, Any]:
    from kervan.cluster import cost as costs

    hybrid = next(one.mix for one in compared if one.mix.spot.maximum)
    market = setup.market
    return {
        "mixes": [one.to_dict() for one in compared],
        "availability": [{"availability": share, "mixes": [one.to_dict() for one in found]} for share, found in curve],
        "nodes": hybrid.nodes,
        "spot_price_share_for_65_percent": costs.spot_price_for(CLAIMED_SAVING, hybrid),
        "market": {
            "zones": market.zones,
            "nodes_per_zone": market.nodes,
            "availability": market.availability,
            "up_s": market.up_s,
            "correlation": market.correlation,
        },
        "start_s": setup.start_s,
        "days": setup.duration_s / 86_400,
        "notes": notes,
    }


def _print_costs(
    mix: "Mix",
    setup: "MarketSetup",
    compared: "list[Compared]",
    curve: "list[tuple[float, list[Compared]]]",
    notes: list[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from kervan.cli.plan import console_is_wide
    from kervan.cluster import cost as costs
    from kervan.units import format_duration

    console = Console(highlight=False, width=None if console_is_wide() else 140)
    market = setup.market

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    for note in notes:
        say(note)
    say(
        f"spot market: {market.zones} zones of {market.nodes} nodes, each whole for {market.availability:.0%} of the "
        f"time and {market.up_s / 3600:g} h at a time; a replica starts in {format_duration(setup.start_s)}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("nodes", "$/h each", "spot", "quoted $/h", "saves", "paid $/h", "saves", "per node served", "served",
                 "all there", "lost/day"):  # fmt: skip
        table.add_column(name, justify="left" if name == "nodes" else "right")
    for one in compared:
        is_spot = bool(one.mix.spot.maximum)
        if not is_spot and one is not compared[0]:
            continue  # the prices of spot change nothing there
        table.add_row(
            str(one.mix), f"{one.prices.on_demand_usd:.2f}", f"{one.prices.spot_usd:.2f}" if is_spot else "",
            f"{costs.undisturbed_usd_per_h(one.mix, one.prices):.2f}", f"{one.undisturbed_saving:.0%}",
            f"{one.usd_per_h:.2f}", f"{one.saving:.0%}", f"{one.saving_served:.0%}", f"{one.mean('capacity'):.1%}",
            f"{one.mean('whole_share'):.0%}", f"{one.mean('losses_per_day'):.1f}",
        )  # fmt: skip
    console.print(table)
    say(f"{curve[0][1][0].mix}, by the share of the time in which a zone is whole:")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("whole", "spot $/h", "paid $/h", "saving", "per node served", "served", "all there"):
        table.add_column(name, justify="right")
    for share, found in curve:
        for one in found:
            table.add_row(
                f"{share:.0%}", f"{one.prices.spot_usd:.2f}", f"{one.usd_per_h:.2f}", f"{one.saving:.0%}",
                f"{one.saving_served:.0%}", f"{one.mean('capacity'):.1%}", f"{one.mean('whole_share'):.0%}",
            )  # fmt: skip
    console.print(table)
    share = costs.spot_price_for(CLAIMED_SAVING, mix)
    reach = f"{CLAIMED_SAVING:.0%} needs spot at {share:.0%} of the on-demand price" if share > 0 else (
        f"{CLAIMED_SAVING:.0%} is more than spot for nothing would save"
    )  # fmt: skip
    say(
        f"{mix}: {mix.spot.maximum} of {mix.nodes} nodes are spot, so at most "
        f"{mix.spot.maximum / mix.nodes:.0%} can be saved, with spot for nothing; {reach}, and no loss"
    )
