"""The pages say what the code does: commands, options, settings, links, numbers and snippets are checked.

Blocks with `<!-- run -->` above them run against the shared fleet, its URL and model name put in for the written ones.
"""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import kervan
from kervan.cli import COMMANDS, cli
from kervan.facts import fleet as facts
from kervan.gateway import kept, server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README_URL = "http://127.0.0.1:8000"
README_MODEL = "Qwen/Qwen3-8B"
SHELLS = ("bash", "sh", "console")
BLOCK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Block:
    """A fenced block; `marker` is the text of the HTML comment right above it."""

    page: str
    line: int
    language: str
    marker: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


BLOCK = re.compile(r"(?:^<!-- (?P<marker>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page.name, line, match["language"], match["marker"] or "", match["text"]))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def commands(program: str) -> Iterator[tuple[str, str]]:
    """(where, command line) of all uses of a program, in shell blocks and in `code`."""
    for block in blocks():
        if block.language in SHELLS:
            for line in block.text.replace("\\\n", " ").splitlines():
                words = line.strip().removeprefix("$ ")
                words = re.sub(r"^([A-Z_]+=\S* )+", "", words)
                if words.split(" ")[0] == program:
                    yield str(block), words
    for page in PAGES:
        for code in CODE.findall(prose(page)):
            words = re.sub(r"^([A-Z_]+=\S* )+", "", code)
            if words.startswith(program + " "):
                yield page.name, words


def cases(found: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(line, id=f"{where} {line[:60]}") for where, line in found]


# ---- what every page keeps to


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_ascii(page: Path) -> None:
    assert page.read_text().isascii()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_tests_exist(page: Path) -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for code in CODE.findall(prose(page)):
        if re.fullmatch(r"test_\w+", code):
            assert re.search(rf"def {code}\(", tests), code
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|sh|md|toml)|[\w.-]+(/[\w.-]+)+\.(json|in|txt)", code):
            near = [ROOT, page.parent, ROOT / "src/kervan", ROOT / "src/kervan/fleet/vllm"]
            assert any((folder / code).exists() for folder in near), code


@pytest.mark.parametrize("line", cases(list(commands("make"))))
def test_make_targets_exist(line: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(words) <= targets


@pytest.mark.parametrize("line", cases(list(commands("bash")) + list(commands("python"))))
def test_scripts_exist(line: str) -> None:
    script = shlex.split(line, comments=True)[1]
    assert (ROOT / script).exists()


# ---- the command line


@pytest.mark.parametrize("line", cases(list(commands("kervan"))))
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    top = click.Context(cli, info_name="kervan")
    group_options = {name for parameter in cli.params for name in parameter.opts} | {"--help", "-h"}
    while words and words[0] in group_options:
        words.pop(0)
    if not words:
        return
    command = cli.get_command(top, words[0])
    assert command is not None, words[0]
    if len(words) == 1 and any(p.required for p in command.params):
        return  # the command is spoken of, not used
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(words[0], words[1:], parent=top)


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a line that starts with `heading`, without its head."""
    lines = text[text.index("\n" + heading) + 1 :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]


def test_the_readme_lists_all_commands() -> None:
    listed = [row[0].strip("`").split()[1] for row in rows((ROOT / "README.md").read_text(), "| command |")]
    assert sorted(listed) == sorted(COMMANDS)


def test_all_options_of_up_are_described() -> None:
    command = cli.get_command(click.Context(cli), "up")
    assert command is not None
    real = {name for p in command.params if isinstance(p, click.Option) for name in p.opts} - {"--help", "-h"}
    table = rows((ROOT / "docs/serving.md").read_text(), "## Options of `kervan up`")
    assert {name for row in table for name in CODE.findall(row[0])} == real


def test_all_settings_are_described_with_their_defaults() -> None:
    table = rows((ROOT / "docs/serving.md").read_text(), "## Config keys")
    described = {row[0].strip("`"): row[1].strip("`") for row in table}
    real = {}
    for field in dataclasses.fields(facts.FleetConfig):
        value: Any = field.default
        if value is dataclasses.MISSING:
            value = field.default_factory() if callable(field.default_factory) else ""
        real[field.name] = "[]" if value == () else str(value)
    assert described == real


@pytest.mark.parametrize("block", [b for b in blocks() if b.language in ("yaml", "toml")], ids=str)
def test_config_files_are_valid(block: Block) -> None:
    settings = tomllib.loads(block.text) if block.language == "toml" else yaml.safe_load(block.text)
    assert facts.from_mapping(settings, str(block)).model == README_MODEL


def test_all_metrics_are_described() -> None:
    table = rows((ROOT / "docs/serving.md").read_text(), "## Metrics")
    source = "".join(Path(str(module.__file__)).read_text() for module in (server, kept))
    real = set(re.findall(r'"(kervan_\w+)"|# TYPE (kervan_replicas) ', source))
    names = {name for pair in real for name in pair if name}
    names |= {f"kervan_replica_{field}" for field in ("running", "waiting", "kv_cache_usage")}
    assert {row[0].strip("`") for row in table} == names


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{kervan.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- numbers

Getter = Callable[[dict[str, Any]], list[float]]


def _milliseconds(level: dict[str, Any]) -> list[float]:
    values = level["added_ttft_p50_s"]
    return [1e3 * value for value in (level["added_ttft_p50_median_s"], min(values), max(values))]


def _ratio(level: dict[str, Any]) -> list[float]:
    return [level["ratio_median"], level["ratio_min"], level["ratio_max"]]


def _speed(side: str) -> Getter:
    return lambda level: [level[side]["out_tok_s"]]


def _cpu(side: str, part: str) -> Getter:
    return lambda level: [level[side]["cpu_us_per_token"][part]]


def _memory(side: str, part: str) -> Getter:
    def values(level: dict[str, Any]) -> list[float]:
        largest = max(level[side][f"{part}_memory"], key=lambda process: process["rss_bytes"])
        return [largest["rss_bytes"] / 1e9, largest["uss_bytes"] / 1e9]

    return values


def _of(side: str, key: str) -> Getter:
    return lambda level: [1e3 * level[side][key]]


def _against(name: str) -> dict[str, Getter]:
    """Columns that compare kervan with one of several servers."""
    return {
        "its tok/s": _speed(name),
        **{f"its {key[:4].upper()}, ms": _of(name, key) for key in ("ttft_p50_s", "tpot_p50_s")},
        **{f"kervan {key[:4].upper()}, ms": _of("kervan", key) for key in ("ttft_p50_s", "tpot_p50_s")},
        "kervan CPU": _cpu("kervan", "front"),
        "its CPU": _cpu(name, "front"),
    }


OPPONENTS = {"vLLM": "bare", "Ray Serve LLM": "ray-llm", "the same, direct": "ray-llm-direct"}

# Head of a README column -> the values of its cell, in their order.
COLUMNS: dict[str, Getter] = {
    "streams": lambda level: [level["concurrency"]],
    "pairs": lambda level: [level["pairs"]],
    "kervan tok/s": _speed("kervan"),
    "vLLM tok/s": _speed("bare"),
    "naive tok/s": _speed("naive"),
    "ratio": _ratio,
    "factor": _ratio,
    "added TTFT p50, ms": _milliseconds,
    "kervan gateways": _cpu("kervan", "front"),
    "vLLM API server": _cpu("bare", "front"),
    "kervan engine": _cpu("kervan", "engine"),
    "vLLM engine": _cpu("bare", "engine"),
    "Ray": _cpu("kervan", "control"),
}
MEMORY_COLUMNS: dict[str, Getter] = {
    "each kervan gateway": _memory("kervan", "front"),
    "vLLM API server": _memory("bare", "front"),
    "kervan engine": _memory("kervan", "engine"),
    "vLLM engine": _memory("bare", "engine"),
}
TABLE = re.compile(r"^<!-- numbers: (\S+) -->\n((?:\|.*\n)+)", re.M)


def measured() -> list[Any]:
    """(record, heads, cells) of each row in a marked table."""
    found = []
    for record, table in TABLE.findall((ROOT / "README.md").read_text()):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found += [pytest.param(record, lines[0], row, id=f"{Path(record).stem} {row[0]}") for row in lines[2:]]
    return found


def test_the_readme_has_numbers() -> None:
    assert len(measured()) >= 8


@pytest.mark.parametrize(("record", "heads", "cells"), measured())
def test_numbers_are_those_of_the_record(record: str, heads: list[str], cells: list[str]) -> None:
    summary = json.loads((ROOT / record).read_text())["summary"]
    named = OPPONENTS[cells[heads.index("against")]] if "against" in heads else summary[0]["against"]
    level = next(row for row in summary if (row["concurrency"], row["against"]) == (int(cells[0]), named))
    assert level["pairs_with_errors"] == 0
    columns = COLUMNS | (MEMORY_COLUMNS if "each kervan gateway" in heads else {})
    if "against" in heads:
        columns |= _against(named)
    for head, cell in zip(heads, cells, strict=True):
        if head == "against":
            continue
        written = re.findall(r"-?\d+(?:\.\d+)?", cell)
        real = columns[head](level)
        rounded = [f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(real, written, strict=True)]
        assert written == rounded, head


def test_the_table_of_tools_is_that_of_the_record() -> None:
    text = (ROOT / "docs/bench.md").read_text()
    match = re.search(r"^<!-- truth: (\S+) -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    found = json.loads((ROOT / match[1]).read_text())["rows"]
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    for streams, *cells in lines:
        for tool, cell in zip(heads[1:], cells, strict=True):
            name = tool.removesuffix(" bench") if tool == "kervan bench" else tool
            seen = [
                row["seen"]["ttft_p50_ms"] for row in found if (row["tool"], row["streams"]) == (name, int(streams))
            ]
            assert cell == f"{min(seen):.1f} - {max(seen):.1f}", (tool, streams)


# What docs/twins.md says in a row -> the values in the parts of the record.
TWIN_ROWS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "fleet client, 16 replicas, 1,024 streams": lambda parts: _spread(parts["client"], 1024),
    "fleet client, 16 replicas, 256 streams": lambda parts: _spread(parts["client-by-streams"], 256),
    "gateway as a whole, 1,024 streams": lambda parts: _spread(parts["fleet-16"], 1024, "gateway_us_per_token"),
    "shell around vLLM's app, per request": lambda parts: [parts["shell"]["shell_us_per_request"]],
    "routing decision, 256 replicas": lambda parts: [parts["routing"]["runs"][-1]["us"]],
    "a twin": lambda parts: [parts["fleet-64"]["memory"]["twin"]["pss_mib"]],
    "its Ray actor": lambda parts: [parts["fleet-64"]["memory"]["replica actor"]["pss_mib"]],
    "a gateway, 64 streams": lambda parts: [parts["fleet-64"]["memory"]["gateway"]["pss_mib"]],
    "a gateway, 1,024 streams": lambda parts: [parts["fleet-16"]["memory"]["gateway"]["pss_mib"]],
    "64 twins and one gateway, with Ray": lambda parts: [parts["fleet-64"]["memory"]["total_mib"]],
    "16 twins and one gateway come up": lambda parts: [parts["fleet-16"]["start_s"]],
    "64 twins and one gateway come up": lambda parts: [parts["fleet-64"]["start_s"]],
}


def _spread(part: dict[str, Any], streams: int, name: str = "client_us_per_token") -> list[float]:
    found = sorted(run[name] for run in part["runs"] if run["streams"] == streams)
    return [statistics.median(found), found[0], found[-1]]


def test_the_costs_of_twins_are_those_of_the_record() -> None:
    match = re.search(r"^<!-- twins: (\S+) -->\n((?:\|.*\n)+)", (ROOT / "docs/twins.md").read_text(), re.M)
    assert match is not None
    parts = json.loads((ROOT / match[1]).read_text())["parts"]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    assert {what for what, _ in lines} == TWIN_ROWS.keys()
    for what, cell in lines:
        written = re.findall(r"\d+(?:\.\d+)?", cell.replace(",", ""))
        real = [f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(TWIN_ROWS[what](parts), written, strict=True)]
        assert written == real, what


def _table(page: str, marker: str) -> tuple[list[Any], list[list[str]]]:
    """The records that the marker above a table names, and its rows."""
    match = re.search(rf"^<!-- {marker}: (.+?) -->\n((?:\|.*\n)+)", (ROOT / "docs" / page).read_text(), re.M)
    assert match is not None
    found = [json.loads((ROOT / f"benchmarks/records/{name}.json").read_text()) for name in match[1].split()]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    return found, lines


def test_the_gateways_on_a_large_host_are_those_of_the_record() -> None:
    (record,), lines = _table("twins.md", "gateways")
    scaling = record["parts"]["scaling"]
    alone = {run["streams"]: run["client_us_per_token"] for run in scaling["client"]}
    runs = {(str(run["gateways"]), f"{run['streams']:,}"): run for run in scaling["runs"]}
    assert {(gateways, streams) for gateways, streams, *_ in lines} == runs.keys()
    for gateways, streams, *cells in lines:
        run = runs[gateways, streams]
        assert not run["errors"]
        assert cells == [
            f"{run['tok_s']:,.0f}",
            f"{run['tok_s'] / run['twins_offer_tok_s']:.0%}",
            f"{run['tokens_per_chunk']:.1f}",
            f"{run['tok_s_per_gateway_core']:,.0f}",
            f"{run['gateway_us_per_token']:.0f}, {alone[run['streams'] // run['gateways']]:.1f}",
        ], (gateways, streams)


def test_moves_on_gpus_are_those_of_the_records() -> None:
    found, lines = _table("migration.md", "moves")
    sums: dict[str, list[int]] = {}
    for row in (row for record in found for row in record["rows"] if "same" in row and "naive" not in row["case"]):
        control = row.get("control", {"same": 0, "asked": 0})
        counts = row["same"], row["moved"], control["same"], control["asked"]
        sums[row["engine"]] = [a + b for a, b in zip(sums.get(row["engine"], [0] * 4), counts, strict=True)]
    real = {name: [f"{a:,} of {b:,}", f"{c:,} of {d:,}"] for name, (a, b, c, d) in sums.items()}
    assert {name: cells for name, *cells in lines} == real


def test_how_often_bf16_changes_an_answer_is_that_of_the_record() -> None:
    (record,), lines = _table("migration.md", "flips")
    rows = {(row["engine"], row["sampling"], row["what"]): row for row in record["rows"] if "differ" in row}
    assert lines
    for engine, sampling, *cells in lines:
        both = [rows[engine, sampling, what] for what in ("in batches of 10", "moved at a random token")]
        counts = [f"{row['differ']} of {row['asked']}" for row in both]
        assert cells == [*counts, ", ".join(f"{row['per_1000_tokens']:.1f}" for row in both)]


def test_the_planners_errors_are_those_of_its_records() -> None:
    match = re.search(r"^<!-- planner errors -->\n((?:\|.*\n)+)", (ROOT / "docs/planner.md").read_text(), re.M)
    assert match is not None
    command = [sys.executable, str(ROOT / "benchmarks/planner_errors.py"), "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert match[1] == printed


CHAOS_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "disruptions": lambda found: str(found["disruptions"]),
    "streams": lambda found: f"{found['streams']:,}",
    "tokens": lambda found: f"{found['tokens']:,}",
    "broken": lambda found: str(found["broken"]),
    "lost": lambda found: str(found["tokens_lost"]),
    "doubled": lambda found: str(found["tokens_doubled"]),
    "wrong": lambda found: str(found["tokens_wrong"]),
    "moves": lambda found: str(found["moves"]),
    "gap p50": lambda found: f"{1e3 * found['gap_s']['p50']:.0f}",
    "gap p99": lambda found: f"{1e3 * found['gap_s']['p99']:.0f}",
}


def test_the_table_of_chaos_is_that_of_its_records() -> None:
    text = (ROOT / "docs/chaos.md").read_text()
    match = re.search(r"^<!-- chaos records -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()]
    assert lines
    for cells in lines:
        link = LINK.fullmatch(cells[0])
        assert link is not None, cells[0]
        found = json.loads((ROOT / "docs" / link[1]).read_text())["result"]
        assert cells[1:] == [CHAOS_COLUMNS[head](found) for head in heads[1:]], cells[0]


def test_versions_and_hardware_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text()
    match = re.search(r"^<!-- versions: (.+?) -->\n(.+?)\n\n", text, re.M | re.S)
    assert match is not None
    section = text[text.index("\n## Measured") :]
    for path in match[1].split():
        record = json.loads((ROOT / path).read_text())
        versions, hardware, settings = record["versions"], record["hardware"], record["settings"]
        words = match[2].replace("\n", " ")
        for name, key in (
            ("vLLM", "vllm"),
            ("torch", "torch"),
            ("Ray", "ray"),
            ("Python", "python"),
            ("kervan", "kervan"),
        ):
            assert f"{name} {versions[key]}" in words
        gpu, _, driver = hardware["gpu"].split(", ")
        assert f"driver {driver}" in words
        assert f"One {gpu}, {hardware['cores']} CPU cores" in section
        assert f"{settings['isl']} tokens in and {settings['osl']} out" in section
        assert {len(level["kervan"]["front_memory"]) for level in record["summary"]} == {2}  # "two gateways"


# ---- the first lines of the README


def marked(marker: str) -> Block:
    return next(block for block in blocks() if block.page == "README.md" and block.marker == marker)


@pytest.mark.parametrize("marker", ["demo output", "test output"])
def test_outputs_are_of_real_runs(marker: str) -> None:
    assert "PLACEHOLDER" not in marked(marker).text, "paste what the command printed"


def test_the_demo_is_seen_by_line_25() -> None:
    assert marked("demo output").line <= 25
    assert "make demo" in next(block for block in blocks() if block.page == "README.md").text


# ---- snippets


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def runnable(language: str) -> list[Any]:
    return [pytest.param(b, id=str(b)) for b in blocks() if b.language == language and b.marker == "run"]


@pytest.fixture
def adapted(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """A snippet with the shared fleet's URL and model in place of the README's."""
    try:
        url = request.getfixturevalue("fleet").url
    except pytest.FixtureLookupError:
        pytest.skip("no fixture 'fleet' for tests/docs: snippets are compiled, not run")
    with urllib.request.urlopen(f"{url}/v1/models", timeout=BLOCK_TIMEOUT_S) as response:
        model = json.load(response)["data"][0]["id"]
    return lambda text: text.replace(README_URL, url).replace(README_MODEL, model)


@pytest.mark.fleet
@pytest.mark.parametrize("block", runnable("python"))
def test_python_runs(block: Block, adapted: Callable[[str], str]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(adapted(block.text), str(block), "exec"), {"__name__": "__main__"})
    assert printed.getvalue().strip()


@pytest.mark.fleet
@pytest.mark.parametrize("block", runnable("bash"))
def test_shell_runs(block: Block, adapted: Callable[[str], str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    for line in adapted(block.text).replace("\\\n", " ").splitlines():
        command = f"{line} --silent --show-error --fail-with-body"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=BLOCK_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        answer = json.loads(done.stdout)
        assert answer and "error" not in answer


PLANS = re.compile(r"^```text\n\$ (kervan plan [^\n]*)\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/planner.md"])
def test_the_plan_shown_is_what_the_command_prints(page: str) -> None:
    found = PLANS.findall((ROOT / page).read_text())
    assert found
    for command, shown in found:
        words = [sys.executable, "-m", "kervan", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        printed = iter([line.rstrip() for line in done.stdout.splitlines()])
        for line in shown.splitlines():
            assert line == "..." or line in printed, line  # in this order
