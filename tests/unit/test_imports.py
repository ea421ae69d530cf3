"""What each part may import: the direction between packages, and what stays unloaded."""

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kervan

PACKAGE = Path(kervan.__file__).parent
BOTTOM = (
    "errors.py",
    "units.py",
    "stats.py",
    "ports.py",
    "plain_tokenizer.py",
    "autogroups.py",
    "direct_http.py",
    "logs.py",
    "metrics.py",
    "report",
    "vendor",
)
ABOVE = ("sim", "comm", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli", "demo")
HEAVY = ("ray", "torch", "transformers", "uvicorn", "vllm", "zmq")

# (part, parts of kervan it must not import): arrows point from what is used to what uses it.
#   errors, units, stats, ports, vendor <- facts <- config, policy <- sim, fleet, bench, notices <- twin, gateway <- serve <- chaos <- cli
#   sim, observe <- comm <- fleet, serve, calibrate <- cli
#   bench <- calibrate <- cli
FORBIDDEN = [
    *((part, ("facts", "config", "policy", *ABOVE)) for part in BOTTOM),
    ("facts", ("config", "policy", *ABOVE)),
    ("config", ("policy", *ABOVE)),
    ("policy", ("facts", *ABOVE)),
    ("sim", ("policy", *(part for part in ABOVE if part != "sim"))),
    ("fleet", ("twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli", "demo")),
    ("twin", ("policy", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli", "demo")),
    ("bench", ("fleet", "twin", "gateway", "notices", "serve", "chaos", "calibrate", "cli", "demo")),
    ("gateway", ("twin", "bench", "notices", "serve", "chaos", "calibrate", "cli", "demo")),
    (
        "notices",
        (
            "facts",
            "config",
            "policy",
            "sim",
            "fleet",
            "twin",
            "bench",
            "gateway",
            "serve",
            "chaos",
            "calibrate",
            "cli",
            "demo",
        ),
    ),
    ("serve", ("bench", "chaos", "calibrate", "cli", "demo")),
    ("chaos", ("policy", "gateway", "notices", "calibrate", "cli", "demo")),
    ("calibrate", ("policy", "fleet", "twin", "gateway", "notices", "serve", "chaos", "cli", "demo")),
    ("demo", ("fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli")),
]
# What reads the machine is asked by the command line alone; it knows errors and the table of GPUs.
FORBIDDEN += [
    ("observe", ("policy", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "cli", "demo")),
    *((part, ("observe",)) for part in dict(FORBIDDEN)),
]
# What measures GPUs looks at them too, and is used by what starts and watches engines.
FORBIDDEN += [
    ("comm", ("policy", "plan", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli")),
]
# The planner knows facts and the engine on paper; what is below it does not know the planner.
FORBIDDEN += [
    ("plan", ("policy", "observe", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "cli", "demo")),
    *((part, ("plan",)) for part in (*BOTTOM, "facts", "config", "policy", "sim", "observe")),
]
# The simulator runs the policies over the engine on paper; nothing below the command line knows it.
FORBIDDEN += [
    ("simulate", ("observe", "fleet", "twin", "gateway", "notices", "serve", "chaos", "calibrate", "cli", "demo")),
    *((part, ("simulate",)) for part in dict(FORBIDDEN)),
]
# Ranks know nothing, and are used by what measures and what watches engines. Training's rooms: memory knows the facts
# and the engine on paper, pipeline both; commands use them.
BESIDE = ("config", "policy", "plan", "observe", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos")
FORBIDDEN += [
    ("ranks", ("facts", "sim", "comm", "calibrate", "cli", "demo", "memory", "pipeline", *BESIDE)),
    ("memory", ("calibrate", "cli", "demo", "pipeline", *BESIDE)),
    ("pipeline", ("sim", "calibrate", "cli", "demo", *BESIDE)),
    *((part, ("memory", "pipeline")) for part in dict(FORBIDDEN)),
    *((part, ("ranks",)) for part in dict(FORBIDDEN) if part not in ("comm", "fleet", "serve", "calibrate")),
]
# What clusters are made from is known from a fleet's settings and the simulator's market; commands alone use it.
FORBIDDEN += [
    ("cluster", ("observe", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli")),
    *((part, ("cluster",)) for part in dict(FORBIDDEN) if part != "cluster"),
]
# The doctor judges this machine by what others read of it; only commands know it.
FORBIDDEN += [
    ("doctor", ("policy", "plan", "twin", "bench", "gateway", "notices", "chaos", "calibrate", "cli", "demo")),
    *((part, ("doctor",)) for part in dict(FORBIDDEN)),
]
# What was recorded is judged on paper; Ray's room records, and commands tell.
FORBIDDEN += [
    (
        "profile",
        ("policy", "plan", "fleet", "twin", "bench", "gateway", "notices", "serve", "chaos", "calibrate", "cli"),
    ),
    *((part, ("profile",)) for part in dict(FORBIDDEN) if part != "serve"),
]
# (library, the only parts that may import it)
CONFINED = [
    ("ray", ("serve/", "fleet/vllm/stages.py")),
    ("vllm", ("fleet/vllm/",)),
    ("zmq", ("fleet/", "twin/")),
    ("click", ("cli/",)),
    ("rich", ("cli/",)),
    (
        "torch",
        (
            "calibrate/",
            "comm/",
            "demo/",
            "fleet/vllm/profiling.py",
            "fleet/vllm/runner_v1.py",
            "memory/",
            "pipeline/stage_work.py",
            "ranks/group.py",
        ),
    ),
    ("deepspeed", ("memory/zero.py",)),
    ("jinja2", ("report/page.py",)),
    ("plotly", ("report/page.py",)),
    ("aiohttp", ("notices/metadata.py", "gateway/")),
    ("opentelemetry", ("gateway/tracing.py",)),
    ("pynvml", ("observe/nvml.py", "observe/gpu_state.py", "observe/gpu_counters.py")),
]


def source_files(part: str = "") -> list[Path]:
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Dotted names of all imports of a file, at the top and inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


@pytest.mark.parametrize(("part", "forbidden"), FORBIDDEN, ids=[part for part, _ in FORBIDDEN])
def test_imports_point_one_way(part: str, forbidden: tuple[str, ...]) -> None:
    files = source_files(part)
    assert files
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in imported(path)
        if any(f"{name}.".startswith(f"kervan.{other}.") for other in forbidden)
    ]
    assert wrong == []


@pytest.mark.parametrize(("library", "allowed"), CONFINED, ids=[library for library, _ in CONFINED])
def test_libraries_stay_in_their_parts(library: str, allowed: tuple[str, ...]) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in source_files()
        for name in imported(path)
        if name.partition(".")[0] == library
    }
    assert users, f"nothing imports {library} any more"
    assert [user for user in users if not user.startswith(allowed)] == []


def test_packages_of_pure_code_import_nothing_heavy_even_inside_functions() -> None:
    for part in (
        *BOTTOM,
        "facts",
        "config",
        "policy",
        "sim",
        "plan",
        "simulate",
        "cluster",
        "bench",
        "notices",
        "observe",
    ):
        for path in source_files(part):
            assert not {name.partition(".")[0] for name in imported(path)} & set(HEAVY), path


def test_no_server_of_ours_is_asked_through_a_proxy_of_the_environment() -> None:
    # urlopen honours http_proxy, and no proxy knows this machine's or a cluster's addresses.
    assert [path for path in source_files() if "urlopen(" in path.read_text()] == []
    openers = [str(path.relative_to(PACKAGE)) for path in source_files() if "build_opener(" in path.read_text()]
    assert sorted(openers) == ["direct_http.py", "observe/hub.py"]  # the hub is asked as the environment says


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("library", ["ray", "vllm", "zmq"])
def test_this_environment_has_what_must_stay_unloaded(library: str) -> None:
    assert importlib.util.find_spec(library) is not None


def test_pure_packages_load_nothing_heavy() -> None:
    modules = [
        "kervan",
        "kervan.errors",
        "kervan.units",
        "kervan.stats",
        "kervan.ports",
        "kervan.autogroups",
        "kervan.logs",
        "kervan.metrics",
        "kervan.vendor.vllm_names",
        "kervan.cli.bench_view",
        "kervan.cli.render",
    ]
    for part in (
        "facts",
        "config",
        "policy",
        "sim",
        "plan",
        "simulate",
        "cluster",
        "bench",
        "notices",
        "observe",
        "comm",
        "calibrate",
        "doctor",
    ):
        names = (path.relative_to(PACKAGE).with_suffix("").parts for path in source_files(part))
        modules += [".".join(("kervan", *name)) for name in names if name[-1] != "__init__"]
    assert len(modules) > 6
    assert loaded_by("\n".join(f"import {module}" for module in modules)) == set()


def test_who_needs_one_room_of_the_gateway_does_not_load_its_server() -> None:
    """`kervan up` checks certificates with its code, before it knows whether the server's packages are there."""
    code = "import sys, kervan.gateway.tls; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


COMMANDS = (
    "up",
    "bench",
    "chaos",
    "calibrate",
    "cluster",
    "comm",
    "doctor",
    "observe",
    "plan",
    "simulate",
    "memory",
    "pipeline",
)


def test_help_loads_nothing_heavy() -> None:
    """Each in a fork of an interpreter that has loaded nothing of it."""
    helps = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    code = f"""
import os, runpy
loaded = {{}}
for arguments in {helps!r}:
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.argv = ["kervan", *arguments]
        os.dup2(2, 1)
        status = None
        try:
            runpy.run_module("kervan", run_name="__main__")
        except SystemExit as end:
            status = end.code
        heavy = [m for m in {HEAVY!r} if m in sys.modules]
        os.write(writer, f"ended with {{status or 0}} {{heavy}}".encode())
        os._exit(0)
    os.close(writer)
    loaded[" ".join(arguments)] = os.read(reader, 1000).decode()
    os.wait()
assert set(loaded.values()) == {{"ended with 0 []"}}, loaded
"""
    assert loaded_by(code) == set()


def test_the_package_names_its_public_things_sorted() -> None:
    assert kervan.__all__ == sorted(kervan.__all__)
    assert all(hasattr(kervan, name) for name in kervan.__all__)
