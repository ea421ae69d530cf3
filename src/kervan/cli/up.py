"""`kervan up`."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kervan import autogroups
from kervan.cli import option_types, options, sigterm
from kervan.config import fleet as fleets
from kervan.config import key_file, reach
from kervan.config.autoscale import POLICIES
from kervan.config.fleet import SETTINGS
from kervan.errors import ConfigError

SECTIONS = {
    "Layout": "--auto --tp --pp --ep --replicas --pool --gateways --routing "
    "--nodes-per-replica --gpus-per-replica --device --adds-nodes",
    "Autoscaling": "--policy --slo --schedule --time-zone",
    "Engine": "--engine-arg --env --engine --gpu --twin --preflight",
    "Clients": "--host --port --shared-port --api-keys --api-key --tls-certificate --tls-key --tls-client-ca --ingress",
    "Observe": "--log-format --otlp",
    "Fleet": "--config --name --address --yes --detach --json --help",
}


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("model", required=False)
@click.option(
    "--auto",
    is_flag=True,
    help="Use the layout, replicas and batch limits that kervan plan recommends for all GPUs here.",
)
@options.setting("--tp")
@options.setting("--pp")
@options.setting("--ep")
@options.setting("--nodes-per-replica")
@options.setting("--gpus-per-replica")
@options.setting("--device", type=click.Choice(["GPU", "CPU"], case_sensitive=False))
@options.setting("--adds-nodes/--fixed-nodes", "adds_nodes")
@options.setting("--engine")
@options.setting("--gpu", type=option_types.GPU)
@click.option("--twin", "twin", multiple=True, metavar="KEY=VALUE", help="Setting of a twin, like speed=2; repeatable.")
@options.setting("--replicas", type=options.Count())
@options.pools
@options.setting("--gateways", type=options.Count())
@options.setting("--policy", type=click.Choice(POLICIES))
@options.setting("--slo", type=option_types.SLO)
@click.option(
    "--schedule",
    "schedule",
    multiple=True,
    metavar="DAYS HH:MM min=N",
    help=f"{SETTINGS['schedule'].description}; repeatable.",
)
@options.setting("--time-zone")
@options.setting("--routing")
@options.setting("--host")
@options.setting("--port")
@options.setting("--shared-port/--own-port", "shared_port")
@options.setting("--api-keys", "api_keys_file", type=option_types.FILE, metavar="FILE")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    help="Key that clients must send; repeatable. Others see it in the process list: better KERVAN_API_KEY, or "
    "KERVAN_API_KEYS=NAME:KEY,...",
)
@options.setting("--tls-certificate", metavar="FILE")
@options.setting("--tls-key", metavar="FILE")
@options.setting("--tls-client-ca", metavar="FILE")
@click.option("--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="A vLLM argument; repeatable.")
@click.option(
    "--env", "env", multiple=True, metavar="KEY=VALUE", help="Environment variable of engines and gateways; repeatable."
)
@options.setting("--preflight/--no-preflight", "preflight")
@options.setting("--ingress")
@options.setting("--log-format")
@options.setting("--otlp", metavar="URL")
@click.option("--config", "config_path", type=option_types.FILE, help="YAML or TOML file with the same settings.")
@options.name
@options.address
@click.option("--yes", is_flag=True, help="Apply a change to a running fleet even if it disturbs clients.")
@click.option("--detach", is_flag=True, help="Return when the fleet is ready.")
@options.as_json
@sigterm.interrupting()
def up(
    config_path: Path | None, address: str | None, yes: bool, detach: bool, as_json: bool, auto: bool, **given: Any
) -> None:
    """Serve MODEL: a Hugging Face id or a local directory.

    Prints the URL, or returns with --detach, when every replica has produced a token. Options override --config. On a
    fleet that is already running, the given settings are applied and the others kept: new replicas are ready before old
    ones leave.
    """
    from kervan.cli import render
    from kervan.serve.attach import is_up
    from kervan.serve.start import Startup

    settings = _settings(config_path, given)
    source = f"config file {config_path}" if config_path else "kervan up"
    if is_up(settings["name"], address):
        _change(settings, source, address, is_confirmed=yes, as_json=as_json)
        return
    say = render.progress_lines(log_format=settings.get("log_format"))
    if starved := autogroups.warning():
        say(starved)
    if auto:
        settings = _planned(settings, address, say)
    config = fleets.from_mapping(settings, source)
    for line in config.autoscaler.warnings if config.autoscaler is not None else ():
        say(line)
    if config.api_keys_file and (unsafe := key_file.warning(Path(config.api_keys_file))):
        say(unsafe)
    startup = Startup(config, address, say)
    status = startup.run()
    say(reach.described(startup.config))
    if as_json:
        render.print_json(status.to_dict())
    else:
        print(f"{config.name} serves {config.model} at {status.url}", flush=True)
    if detach:
        startup.keep()
        return
    try:
        print("Ctrl-C stops it", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        from kervan.serve.down import down

        print("stopping", flush=True)
        down(config.name, address)


def _planned(settings: dict[str, Any], address: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The settings with what the planner says for all that is not given.

    Raises: ConfigError where it cannot know the GPUs.
    """
    from kervan.cli import plan as plans
    from kervan.plan import launch, search

    is_twin = settings.get("engine") == "twin"
    if address is not None and not is_twin:
        raise ConfigError(
            "--auto reads the GPUs of this machine, and --address joins a cluster of others; "
            "use the options that kervan plan --gpu KIND --gpus N prints"
        )
    if given := [key for key in ("tp", "pp", "ep", "replicas", "pools") if settings.get(key)]:
        raise ConfigError(
            f"--auto chooses the layout, and {', '.join(given)} {'is' if len(given) == 1 else 'are'} given too; leave "
            "out one of the two"
        )
    arguments = settings.get("engine_args") or {}
    request = plans.plan_request(
        settings.get("model") or "", gpu=settings.get("gpu") or "local", engine_args=arguments, fixed={}
    )
    layout_plan = search.search(request)
    best = launch.launch(request, layout_plan.best, settings["model"])
    say(f"plan: {layout_plan.verdict}")
    size = layout_plan.best.layout
    planned = {"tp": size.tp, "pp": size.pp, "ep": size.ep, "replicas": size.dp}
    return {**settings, **planned, "engine_args": {**best.engine_args, **arguments}}


def _change(settings: dict[str, Any], source: str, address: str | None, *, is_confirmed: bool, as_json: bool) -> None:
    """Bring new settings into a fleet that runs."""
    from kervan.cli import render
    from kervan.errors import FleetError
    from kervan.serve.changes import RunningFleet

    say = render.progress_lines()
    fleet = RunningFleet(settings["name"], address, say)
    change = fleet.plan(settings, source)
    if not change.lines:
        say(f"fleet {settings['name']!r} is up with these settings")
    for line in change.lines:
        say(line)
    if any(line.startswith(("host", "api_keys")) for line in change.lines):
        say(reach.described(change.after))
    if change.warning and not is_confirmed:
        raise FleetError(f"{change.warning}; add --yes to go on")
    status = fleet.apply(change)
    if as_json:
        render.print_json(status.to_dict())
    else:
        render.print_status(status)


def _settings(path: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """File settings, overridden by the options that were given."""
    settings = fleets.load_file(path) if path is not None else {}
    name = given.pop("name")
    if name != options.DEFAULT_NAME or not isinstance(settings.get("name"), str):
        settings["name"] = name
    if keys := options.api_keys(given.pop("api_keys")):
        settings["api_keys"] = keys
    if (keys_file := given.pop("api_keys_file")) is not None:
        settings["api_keys_file"] = str(keys_file.expanduser().resolve())
    engine_args = options.engine_arguments(given.pop("engine_args"))
    env = dict(options.parse_assignment(text, "--env") for text in given.pop("env"))
    twin = dict(options.parse_assignment(text, "--twin") for text in given.pop("twin"))
    for key, extra in (("engine_args", engine_args), ("env", env), ("twin", twin)):
        before = settings.get(key) or {}
        if extra or before:
            settings[key] = {**before, **extra} if isinstance(before, dict) else before
    if pools := options.pool_settings(given.pop("pools")):
        before = settings.get("pools") or {}
        settings["pools"] = {**before, **pools["pools"]} if isinstance(before, dict) else before
    settings |= options.gateway_settings(given.pop("gateways"))
    settings |= options.replica_settings(given.pop("replicas"))
    if (slo := given.pop("slo")) is not None:
        settings["slo"] = str(slo)
    if schedule := given.pop("schedule"):
        settings["schedule"] = list(schedule)
    settings |= {key: value for key, value in given.items() if value is not None}
    if settings.get("pools") and "replicas" in settings:
        raise ConfigError(
            f"--replicas {settings['replicas']} and --pool both set the number of replicas; give only the pools, "
            f"for example --pool on-demand:{settings['replicas']} --pool spot:0..6"
        )
    return settings
