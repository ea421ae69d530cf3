"""What several commands read in the same way."""

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import pytest

from kervan.bench import arrivals
from kervan.cli import COMMANDS, option_types, options
from kervan.cli.bench_options import BenchOptions
from kervan.config import fleet
from kervan.config.fleet import SETTINGS
from kervan.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("max_model_len=4096", ("max_model_len", "4096")),
        ("a=b=c", ("a", "b=c")),
        ("--dtype=half", ("dtype", "half")),
        (" a =", ("a", "")),
    ],
)
def test_assignments(text: str, pair: tuple[str, str]) -> None:
    assert options.parse_assignment(text, "--engine-arg") == pair


@pytest.mark.parametrize("text", ["foo", "=1", "", "  =1"])
def test_no_assignment_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"has no key=value form; write for example --engine-arg max_model_len=4096"):
        options.parse_assignment(text, "--engine-arg")


def shown(decorate: object) -> click.Option:
    command = click.command()(decorate(lambda **_: None))  # type: ignore[operator]
    return next(parameter for parameter in command.params if isinstance(parameter, click.Option))


def test_an_option_shows_what_its_setting_says() -> None:
    port = shown(options.setting("--port"))
    assert port.help == f"{SETTINGS['port'].description}. [default: 8000]"
    assert port.default is None  # a file or a running fleet may say otherwise
    assert port.type is click.INT
    assert shown(options.setting("--gpu")).help == f"{SETTINGS['gpu'].description}."  # without a default
    own = shown(options.setting("--shared-port/--own-port", "shared_port"))
    assert (own.name, own.is_flag, own.default) == ("shared_port", True, None)
    assert own.help is not None
    assert own.help.endswith("[default: own-port]")


def test_the_values_of_an_option_are_those_of_its_setting() -> None:
    engine = shown(options.setting("--engine")).type
    assert isinstance(engine, click.Choice)
    assert list(engine.choices) == ["vllm", "twin"]


# ---- one grammar over all commands and the config file


def all_options() -> dict[str, dict[str, click.Option]]:
    """Of all commands: by its name, then by that of the command."""
    found: dict[str, dict[str, click.Option]] = defaultdict(dict)
    for name in COMMANDS:
        module = name.replace("-", "_")
        command = getattr(importlib.import_module(f"kervan.cli.{module}"), module)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                found[parameter.opts[0]][name] = parameter
    return found


OPTIONS = all_options()
# Names with which an option has this type in each command that has it.
NAMES_BY_TYPE: list[tuple[click.ParamType[Any], str]] = [
    (
        option_types.DURATION,
        "--duration --for --deadline --every --stall --timeout --think-time --trial-time --kill-every --drain-every "
        "--hang-every --decide-every --notice --hold-timeout",
    ),
    (option_types.DURATIONS, "--start-time"),
    (option_types.RATE, "--rate --replica-rate"),
    (option_types.LOSS_RATE, "--losses"),
    (option_types.ADDRESS, "--address"),
    (option_types.FLEET_NAME, "--name"),
    (option_types.LENGTHS, "--isl --osl"),
    (option_types.SLO, "--slo"),
    (option_types.LAYOUT, "--layout"),
    (option_types.GPU, "--gpu"),
    (option_types.GPUS, "--gpus"),
    (option_types.STREAMS, "--streams --concurrency"),
    (option_types.SHARE, "--attain --prefix-hit"),
    (option_types.FACTOR, "--speed --trace-speed"),
    (option_types.FILE, "--trace --record"),
]
PROBES = (
    "", " ", "0", "1", "5", " 5 ", "007", "-1", "+5", "1.5", ".5", "1e3", "1_000", "1,000", "1,2", "1k", "nan", "inf", "\u0665",
    "5/s", "5 / s", "300/min", "18000/h", "5 requests/s", "5rps", "5/day", "0/s",
    "5s", "5 s", "90sec", "250ms", "2min", "2m", "1.5h", "3 hours", "5S", "1min30s", "1d",
    "64", "32..512", "512..32", "128@0.7,1024@0.3", "lognormal:median=200,sigma=1", "normal:mean=200,std=50", "64 tokens",
    "ttft=1s", "ttft=1s,tpot=50ms", "TTFT=1s", "ttft=50", "e2e=20s", "p99=1s", "ttft=1s,ttft=2s",
    "tp=2", "tp=2,pp=2", "TP2", "TP2xPP2", "4 x TP2", "tp=0", "tp:2", "2x", "10x", "60%", "0.6", "101%",
    "H200", "h200", "NVIDIA H200", "local", "Local", "H2000", "1..4", "4..1",
)  # fmt: skip


def read(option: click.Option, text: str) -> Any:
    """The value of `text`, or "refused"; of a sweep, the only one."""
    try:
        value = option.type.convert(text, option, None)
    except (ConfigError, click.UsageError):
        return "refused"
    if isinstance(option.type, option_types.Sweep):
        return value[0] if len(value) == 1 else "several"
    return value


@pytest.mark.parametrize(
    "name", sorted(name for name, by_command in OPTIONS.items() if len(by_command) > 1), ids=lambda name: name
)
def test_an_option_reads_the_same_in_all_commands(name: str) -> None:
    first, *others = OPTIONS[name].values()
    for text in PROBES:
        values = [read(option, text) for option in (first, *others)]
        values = [text if isinstance(value, Path) else value for value in values if value != "several"]
        assert all(value == values[0] or value != value for value in values), text  # nan is not itself


@pytest.mark.parametrize(("kind", "names"), NAMES_BY_TYPE, ids=lambda value: value if isinstance(value, str) else "")
def test_options_of_one_kind_have_one_type(kind: click.ParamType[Any], names: str) -> None:
    for name in names.split():
        for option in OPTIONS[name].values():
            assert (option.type.each if isinstance(option.type, option_types.Sweep) else option.type) is kind


def test_no_option_has_a_type_of_its_own_for_what_another_one_says() -> None:
    """A new option for a time, a rate or a load is one of the kinds above, or it is none of theirs."""
    named = {name for _, names in NAMES_BY_TYPE for name in names.split()}
    typed = {
        name
        for name, by_command in OPTIONS.items()
        for option in by_command.values()
        if isinstance(option.type, option_types.Parsed)
    }
    assert typed - named == set()
    for name, by_command in OPTIONS.items():
        for command, option in by_command.items():
            words = str(option.default)
            if option.type is click.STRING and fleet_duration(words) is not None:
                pytest.fail(f"{command} {name} has the default {words}, and is no duration")


def fleet_duration(text: str) -> float | None:
    """What a config file makes of a duration; None if it refuses it."""
    try:
        return fleet.from_mapping({"model": "m", "hold_timeout_s": text}, "file").hold_timeout_s
    except ConfigError:
        return None


def test_the_config_file_reads_the_same(tmp_path: Path) -> None:
    duration = OPTIONS["--duration"]["bench"]
    for text in PROBES:
        value = read(duration, text)
        assert fleet_duration(text) == (None if value == "refused" else value), text
    for name in ("gateways", "replicas"):
        option = OPTIONS[f"--{name}"]["up"]
        for text in ("0", "2", "1..4", "0..4", "4..1", "1..", "..4", "many", "2/s", "-1"):
            path = tmp_path / "f.yaml"
            path.write_text(f"{name}: '{text}'\n")
            try:
                settings = fleet.load_file(path)
                found: Any = (settings[name], settings.get(f"max_{name}", 0))
            except ConfigError:
                found = "refused"
            assert found == read(option, text), text


def test_stages_read_rates_and_durations_as_the_options_do() -> None:
    (rate, duration) = OPTIONS["--rate"]["plan"], OPTIONS["--duration"]["bench"]
    for text in PROBES:
        value = read(rate, text)
        if "," not in text and ".." not in text and value != "refused":
            assert arrivals.parse_stages(f"{text}@1s")[0].start_rate == value
        if "," not in text and (value := read(duration, text)) not in ("refused", 0.0):
            assert arrivals.parse_stages(f"1@{text}")[0].duration_s == value


def bench_options(*words: str) -> BenchOptions:
    from kervan.cli.bench import bench

    return BenchOptions(**bench.make_context("bench", ["http://127.0.0.1:8000", *words]).params)


def test_a_load_of_bench_in_the_words_of_plan() -> None:
    rates = [load.stages[0].start_rate for load in bench_options("--rate", "5/s,300/min,5").loads()]
    assert rates == [5.0, 5.0, 5.0]
    (load,) = bench_options("--streams", "8", "--isl", "32..512", "--duration", "2min", "--stall", "500ms").loads()
    assert (load.streams, load.isl, load.osl, load.duration_s, load.stall_s) == (8, "32..512", "64", 120.0, 0.5)
    assert str(bench_options("--slo", "ttft=1s,tpot=50ms").slo()) == "ttft=1s,tpot=50ms"
    assert bench_options("--attain", "90%", "--rate", "2/s").rate_search().attain == 0.9


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--rate", "0"), r"--rate '0' is not a number of requests per second above 0 .*write for example --rate 5/s"),
        (("--rate", "1,x"), r"--rate 'x' is not a number of requests per second"),
        (("--streams", "many"), r"--streams 'many' is not a whole number from 1 to 65,536"),
        (("--isl", "long"), r"--isl 'long' is not a number of tokens; write 64, 32..512"),
        (("--slo", "ttft=1"), r"--slo ttft=1 has no unit; write ttft=1ms or ttft=1s"),
        (("--prefix", "\u00b2x3"), r"--prefix .*: write 4x512"),
        (("--stages", "burst:\u00b2"), r"has no number of requests; write burst:100"),
        (("--duration", "long"), r"--duration 'long' is not a duration; write a number and us, ms"),
    ],
)
def test_what_is_refused_names_the_option(words: tuple[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        bench_options(*words).loads()
