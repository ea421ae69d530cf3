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
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from harness.live import Fleet
from harness.places import REPOSITORY

import kervan
from kervan.cli import COMMANDS, cli
from kervan.config import fleet as fleets

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md")) + sorted((REPOSITORY / "examples").rglob("*.md"))
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


BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(
                Block(str(page.relative_to(REPOSITORY)), line, match["language"], match["marker"] or "", match["text"])
            )
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_pages_are_ascii(page: Path) -> None:
    assert page.read_text().isascii()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_and_tests_exist(page: Path) -> None:
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    for code in CODE.findall(prose(page)):
        if re.fullmatch(r"test_\w+", code):
            assert re.search(rf"def {code}\(", tests), code
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|sh|md|toml)|[\w.-]+(/[\w.-]+)+\.(json|in|txt)", code):
            near = [REPOSITORY, page.parent, REPOSITORY / "src/kervan", REPOSITORY / "src/kervan/fleet/vllm"]
            assert any((folder / code).exists() for folder in near), code


@pytest.mark.parametrize("line", cases(list(commands("make"))))
def test_make_targets_exist(line: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(words) <= targets


@pytest.mark.parametrize("line", cases(list(commands("bash")) + list(commands("python"))))
def test_scripts_exist(line: str) -> None:
    script = shlex.split(line, comments=True)[1]
    assert (REPOSITORY / script).exists()


# ---- the command line


@pytest.mark.parametrize("line", cases(list(commands("kervan"))))
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    top = click.Context(cli, info_name="kervan")
    group_options = {name for parameter in cli.params for name in parameter.opts} | {"--help", "-h"}
    with_value = {
        name for parameter in cli.params if not getattr(parameter, "is_flag", True) for name in parameter.opts
    }
    while words and words[0] in group_options:
        words = words[2 if words[0] in with_value else 1 :]
    if not words:
        return
    command = cli.get_command(top, words[0])
    assert command is not None, words[0]
    if isinstance(command, click.Group):
        if len(words) == 1:
            return  # the group is spoken of
        top, words = click.Context(command, parent=top, info_name=words[0]), words[1:]
        command = command.get_command(top, words[0])
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


def test_all_commands_are_described() -> None:
    table = rows((REPOSITORY / "docs/serving.md").read_text(), "## Commands")
    listed = [row[0].strip("`").split()[1] for row in table]
    assert sorted(listed) == sorted(COMMANDS)


def test_all_options_of_up_are_described() -> None:
    command = cli.get_command(click.Context(cli), "up")
    assert command is not None
    real = {name for p in command.params if isinstance(p, click.Option) for name in p.opts} - {"--help", "-h"}
    table = rows((REPOSITORY / "docs/serving.md").read_text(), "## Options of `kervan up`")
    assert {name for row in table for name in CODE.findall(row[0])} == real


def test_all_settings_are_described_with_their_defaults() -> None:
    table = rows((REPOSITORY / "docs/serving.md").read_text(), "## Config keys")
    described = {row[0].strip("`"): (row[1].strip("`"), plain(row[2])) for row in table}
    real = {}
    for setting in fleets.SETTINGS.values():
        default = {"()": "[]", str(dataclasses.MISSING): ""}.get(str(setting.default), str(setting.default))
        real[setting.name] = default, setting.description
    assert described == real


def plain(text: str) -> str:
    """A cell without links and code marks."""
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).replace("`", "")


@pytest.mark.parametrize("block", [b for b in blocks() if b.language in ("yaml", "toml")], ids=str)
def test_config_files_are_valid(block: Block, tmp_path: Path) -> None:
    path = tmp_path / f"fleet.{block.language}"
    path.write_text(block.text)
    assert fleets.from_mapping(fleets.load_file(path), str(block)).model == README_MODEL


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{kervan.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


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
def adapted(fleet: Fleet) -> Callable[[str], str]:
    """A snippet with the shared fleet's URL and model in place of the README's."""
    url = fleet.url
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


@pytest.mark.parametrize("page", ["README.md", "docs/planner.md", "docs/70b.md"])
def test_the_plan_shown_is_what_the_command_prints(page: str) -> None:
    found = PLANS.findall((REPOSITORY / page).read_text())
    assert found
    for command, shown in found:
        words = [sys.executable, "-m", "kervan", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
        printed = iter([line.rstrip() for line in done.stdout.splitlines()])
        for line in shown.splitlines():
            assert line == "..." or line in printed, line  # in this order


SIMULATIONS = re.compile(r"^```text\n\$ (kervan simulate [^\n]*)\n(.*?)^```", re.M | re.S)


def test_the_simulation_shown_is_what_the_command_prints() -> None:
    """Its load, notes and policies; figures of policies change whenever one of them learns something."""
    ((command, shown),) = SIMULATIONS.findall((REPOSITORY / "docs/simulator.md").read_text())
    words = [sys.executable, "-m", "kervan", *shlex.split(command)[1:], "--processes", "1"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True)
    printed = done.stdout.splitlines()
    lines = shown.splitlines()
    assert lines[:2] == printed[:2]
    assert lines[-1] == "..."
    for line, real in zip(lines[2:-1], printed[2:], strict=False):
        assert line.split(" ")[0] == real.split(" ")[0]
        assert len(re.findall(r"\S+", line)) == len(re.findall(r"\S+", real)), real
