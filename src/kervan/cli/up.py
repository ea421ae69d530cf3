"""`kervan up`."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kervan.cli import options, sigterm
from kervan.config import fleet as facts
from kervan.errors import ConfigError

SECTIONS = {
    "Layout": "--auto --tp --pp --ep --replicas --pool --gateways --nodes-per-replica --gpus-per-replica",
    "Engine": "--engine-arg --env --engine --gpu --twin",
    "Clients": "--host --port --shared-port --api-key --ingress",
    "Fleet": "--config --name --address --yes --detach --json --help",
}


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("model", required=False)
@click.option("--auto", is_flag=True, help="Layout, replicas and batch limits as kervan plan says, for all GPUs here.")
@click.option("--tp", type=int, help="GPUs that share each layer (tensor parallel). [default: 1]")
@click.option("--pp", type=int, help="Groups of GPUs that hold consecutive layers (pipeline parallel). [default: 1]")
@click.option("--ep", type=int, help="GPUs that share out each layer's experts: 1 or tp. [default: 1]")
@click.option("--nodes-per-replica", type=int, help="Nodes that share a replica's --pp stages. [default: fewest]")
@click.option("--gpus-per-replica", type=float, help="Share of one GPU for a small model, like 0.5. [default: tp*pp]")
@click.option("--engine", type=click.Choice(["vllm", "twin"]), help="twin: simulated replicas, without a GPU.")
@click.option("--gpu", help="The GPU that a twin stands for, like H200.")
@click.option("--twin", "twin", multiple=True, metavar="KEY=VALUE", help="Setting of a twin, like speed=2; repeatable.")
@click.option("--replicas", type=int, help="Engine replicas, each on tp*pp GPUs. [default: 1]")
@options.pools
@click.option(
    "--gateways",
    type=options.Count(),
    help="HTTP gateways; MIN..MAX: as many as their load asks for. [default: one per 8 cores, at most 4]",
)
@click.option("--host", help="Address to listen on; 0.0.0.0 for all. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [default: 8000]")
@click.option(
    "--shared-port/--own-port", "shared_port", default=None, help="Other fleets may be on the port too. [default: own]"
)
@click.option("--api-key", "api_keys", multiple=True, help="Key that clients must send; repeatable, or KERVAN_API_KEY.")
@click.option(
    "--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="vLLM's own argument; repeatable."
)
@click.option(
    "--env", "env", multiple=True, metavar="KEY=VALUE", help="Environment of engines and gateways; repeatable."
)
@click.option(
    "--ingress", type=click.Choice(["direct", "serve"]), help="direct: gateways answer; serve: HAProxy in front."
)
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="YAML or TOML file with the same words.")
@options.name
@options.address
@click.option("--yes", is_flag=True, help="Change a running fleet also where that costs its clients something.")
@click.option("--detach", is_flag=True, help="Return when the fleet is ready.")
@options.as_json
@sigterm.interrupting()
def up(
    config_path: Path | None, address: str | None, yes: bool, detach: bool, as_json: bool, auto: bool, **given: Any
) -> None:
    """Serve MODEL: a Hugging Face id or a local directory.

    Returns, or prints its URL, when every replica has produced a token. Options win over --config. If the fleet runs
    already, it takes on the settings that are given and keeps the others: new replicas are ready before old ones leave.
    """
    from kervan.cli import render
    from kervan.serve.fleet import is_up
    from kervan.serve.start import Startup

    words = _words(config_path, given)
    source = f"config file {config_path}" if config_path else "kervan up"
    if is_up(words["name"], address):
        _change(words, source, address, is_confirmed=yes, as_json=as_json)
        return
    say = render.progress_lines()
    if auto:
        words = _planned(words, address, say)
    config = facts.from_mapping(words, source)
    startup = Startup(config, address, say)
    status = startup.run()
    if as_json:
        render.print_json(status.to_dict())
    else:
        print(f"{config.name} serves {config.model} at {status.url}", flush=True)
    if detach:
        startup.keep()
        return
    try:
        print("Ctrl-C ends it", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        from kervan.serve.fleet import down

        print("ending", flush=True)
        down(config.name, address)


def _planned(words: dict[str, Any], address: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The settings with what the planner says for all that is not given.

    Raises: ConfigError where it cannot know the GPUs.
    """
    from kervan.cli import plan as plans
    from kervan.plan import launch, search

    is_twin = words.get("engine") == "twin"
    if address is not None and not is_twin:
        raise ConfigError(
            "--auto reads the GPUs of this machine, and --address joins a cluster of others; "
            "use the words that kervan plan --gpu KIND --gpus N prints"
        )
    if given := [key for key in ("tp", "pp", "ep", "replicas", "pools") if words.get(key)]:
        raise ConfigError(
            f"--auto chooses the layout, and {', '.join(given)} {'is' if len(given) == 1 else 'are'} given too; leave "
            "out one of the two"
        )
    arguments = words.get("engine_args") or {}
    request = plans.plan_request(
        words.get("model") or "", gpu=words.get("gpu") or "local", engine_args=arguments, fixed={}
    )
    layout_plan = search.search(request)
    best = launch.launch(request, layout_plan.best, words["model"])
    say(f"plan: {layout_plan.verdict}")
    size = layout_plan.best.layout
    planned = {"tp": size.tp, "pp": size.pp, "ep": size.ep, "replicas": size.dp}
    return {**words, **planned, "engine_args": {**best.engine_args, **arguments}}


def _change(words: dict[str, Any], source: str, address: str | None, *, is_confirmed: bool, as_json: bool) -> None:
    """Bring new settings into a fleet that runs."""
    from kervan.cli import render
    from kervan.errors import FleetError
    from kervan.serve.changes import RunningFleet

    say = render.progress_lines()
    fleet = RunningFleet(words["name"], address, say)
    change = fleet.plan(words, source)
    if not change.lines:
        say(f"fleet {words['name']!r} is up with these settings")
    for line in change.lines:
        say(line)
    if change.warning and not is_confirmed:
        raise FleetError(f"{change.warning}; add --yes to go on")
    status = fleet.apply(change)
    if as_json:
        render.print_json(status.to_dict())
    else:
        render.print_status(status)


def _words(path: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """File settings, overridden by the options that were given."""
    settings = facts.load_file(path) if path is not None else {}
    name = given.pop("name")
    if name != "default" or not isinstance(settings.get("name"), str):
        settings["name"] = name
    keys = given.pop("api_keys") or tuple(filter(None, [os.environ.get("KERVAN_API_KEY")]))
    if keys:
        settings["api_keys"] = keys
    pairs = [facts.parse_assignment(text, "--engine-arg") for text in given.pop("engine_args")]
    engine_args = {key.replace("-", "_"): facts.parse_engine_value(value) for key, value in pairs}
    env = dict(facts.parse_assignment(text, "--env") for text in given.pop("env"))
    twin = dict(facts.parse_assignment(text, "--twin") for text in given.pop("twin"))
    for key, extra in (("engine_args", engine_args), ("env", env), ("twin", twin)):
        before = settings.get(key) or {}
        if extra or before:
            settings[key] = {**before, **extra} if isinstance(before, dict) else before
    if pools := options.pool_words(given.pop("pools")):
        before = settings.get("pools") or {}
        settings["pools"] = {**before, **pools["pools"]} if isinstance(before, dict) else before
    settings |= options.gateway_words(given.pop("gateways"))
    settings |= {key: value for key, value in given.items() if value is not None}
    if settings.get("pools") and "replicas" in settings:
        raise ConfigError(
            f"--replicas {settings['replicas']} beside --pool says twice how many; give only the pools, "
            f"for example --pool on-demand:{settings['replicas']} --pool spot:0..6"
        )
    return settings
