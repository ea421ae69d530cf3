"""The package as it is installed: what is in the wheel, and that it works on bare Pythons, without Ray, vLLM and torch."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.places import MODELS, REPOSITORY

import kervan

PYTHONS = ("3.11", "3.12", "3.13")
UV = Path(sys.executable).parent / "uv"
SOURCE = REPOSITORY / "src" / "kervan"
SIMULATION = ("--gpu", "H200", "--rate", "1/s", "--duration", "1min", "--isl", "200", "--osl", "50")


def test_every_file_of_the_package_that_is_not_code_is_named_for_the_wheel() -> None:
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "kervan"
    ]
    listed = subprocess.run(
        ["git", "ls-files", "src/kervan"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    data = {REPOSITORY / name for name in listed if not name.endswith(".py")}
    packed = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    assert data
    assert data <= packed


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Installed:
    """An environment of its own with what was built, and nothing of this one."""

    python: Path
    scratch: Path

    def run(self, *args: str) -> "subprocess.CompletedProcess[str]":
        words = [str(self.python.with_name("kervan")), *args]
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.scratch), "LANG": "C.UTF-8"}
        return subprocess.run(
            words, cwd=self.scratch, env=env, capture_output=True, text=True, timeout=240, check=False
        )

    def out(self, *args: str) -> str:
        done = self.run(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def error(self, *args: str) -> str:
        done = self.run(*args)
        assert done.returncode == 2, done.stderr
        *_, line = done.stderr.splitlines()
        assert "Traceback" not in done.stderr
        return line


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """From a copy of what the wheel is made of, so that nothing is left in the clone."""
    place = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, place)
    shutil.copytree(SOURCE, place / "src/kervan", ignore=shutil.ignore_patterns("__pycache__"))
    # The wheel is built from the sdist, as an index's users may.
    command = [UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "--out-dir", place / "dist"]
    subprocess.run(command, cwd=place, check=True, timeout=240)
    (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
    return Built(wheel, sdist)


def install(python: Path | str, what: str, scratch: Path, *options: str) -> Installed:
    place = scratch / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", python, place], check=True, timeout=240)
    installing = [UV, "pip", "install", "--quiet", "--python", place / "bin/python", *options, what]
    subprocess.run(installing, check=True, timeout=600)
    return Installed(place / "bin/python", scratch)


def python_named(version: str) -> str:
    """The path of this version's interpreter; the test is skipped where there is none."""
    find = [UV, "python", "find", "--quiet", "--no-project", "--no-python-downloads", version]
    found = subprocess.run(find, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"no Python {version} here")
    return found.stdout.strip()


@pytest.fixture(scope="module", params=PYTHONS)
def bare(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Without extras."""
    scratch = tmp_path_factory.mktemp("bare")
    yield install(python_named(request.param), str(built.wheel), scratch)
    shutil.rmtree(scratch)


def names(archive: Sequence[str]) -> set[str]:
    return {name.split("/")[0] for name in archive}


@pytest.mark.exhaustive
def test_the_wheel_has_the_package_and_its_data_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        packed = set(wheel.namelist())
    ours = {f"kervan/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert {name for name in packed if not name.startswith(f"kervan-{kervan.__version__}.dist-info/")} == ours


@pytest.mark.exhaustive
def test_the_sdist_makes_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
        assert names(sdist.getnames()) == {f"kervan-{kervan.__version__}"}
    command = [UV, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run(
        [*command, "--out-dir", tmp_path / "dist"], cwd=tmp_path / f"kervan-{kervan.__version__}", check=True
    )
    (again,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(built.wheel) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


@pytest.mark.exhaustive
def test_a_bare_install_plans_simulates_and_counts(bare: Installed) -> None:
    assert bare.out("--version") == f"kervan, version {kervan.__version__}\n"
    assert "Serve a model." in bare.out("--help")
    assert bare.out("plan", str(MODELS / "llama3-70b"), "--gpu", "H200", "--gpus", "8").startswith("4 x TP2: ")
    assert "mean replicas" in bare.out("simulate", str(MODELS / "llama3-8b"), *SIMULATION)
    assert "llama3-8b" in bare.out("memory", "estimate", str(MODELS / "llama3-8b"))
    bare.out("observe", "render", "rules", "--target", "127.0.0.1:8000")
    assert list((bare.scratch / "rules").rglob("*.json"))
    installed = subprocess.run(
        [UV, "pip", "list", "--python", bare.python, "--format", "freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"^(ray|torch|vllm|numpy)==", installed, re.M)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("bench", "http://127.0.0.1:1/v1", "--rate", "1", "--duration", "1s"), "needs the package httptools: "),
        (("simulate", str(MODELS / "llama3-8b"), *SIMULATION, "--html", "r.html"), "'kervan[bench]'"),
        (("up", str(MODELS / "llama3-8b"), "--engine", "twin", "--gpu", "H200"), "'kervan[cpu]'"),
        (("demo",), "'kervan[cpu]'"),
        (("demo", "autoscale"), "'kervan[cpu]'"),
        (("pipeline", "bench"), "'kervan[cpu]'"),
        (("comm", "doctor"), "'kervan[gpu]'"),
    ],
)
def test_a_bare_install_names_the_extra_that_a_command_needs(bare: Installed, words: Sequence[str], told: str) -> None:
    assert told in bare.error(*words)


@pytest.mark.exhaustive
def test_the_extras_for_clients_and_clusters_install_beside_each_other(built: Built, tmp_path: Path) -> None:
    """Without vLLM, which is what `make` installs; `gpu` cannot be installed without a gigabyte of CUDA."""
    there = install(sys.executable, f"{built.wheel}[serve,bench,otel]", tmp_path)
    assert "httptools" not in there.run("bench", "http://127.0.0.1:1/v1", "--rate", "1", "--duration", "1s").stderr
    there.out("simulate", str(MODELS / "llama3-8b"), *SIMULATION, "--html", "r.html")
    assert "plotly" in (tmp_path / "r.html").read_text().lower()
    asked = subprocess.run(
        [there.python, "-c", "import kervan; print(kervan.get_fleet)"], capture_output=True, text=True, check=True
    ).stdout
    assert "get_fleet" in asked
