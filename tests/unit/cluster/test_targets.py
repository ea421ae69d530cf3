"""Files for Ray's launcher, Slurm, compose and systemd: what their own schemas and tools take."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from harness import clusters
from harness.kubernetes_schemas import SCHEMAS, told
from harness.places import DATA

from kervan.cluster.request import LAUNCHERS, TARGETS, Machine, Zone
from kervan.config import fleet as fleets
from kervan.errors import ConfigError

LAUNCHER_TARGETS: Any = tuple(LAUNCHERS)


# ---- all


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_the_fleet_in_the_words_of_kervan_up(target: Any) -> None:
    made = clusters.files(target)
    texts = [text for name, text in made.items() if name.endswith("fleet.yaml") or name == "chat.yaml"]
    (settings,) = [yaml.safe_load(text) for text in texts]
    if target == "kuberay":
        settings = yaml.safe_load(settings["data"]["fleet.yaml"])
    there = fleets.from_mapping(settings, target)
    asked = clusters.request(target).fleet
    assert (there.name, there.model, there.tp, there.bounds) == ("chat", asked.model, asked.tp, asked.bounds)


@pytest.mark.parametrize("target", TARGETS)
def test_no_file_has_a_key_of_the_fleet(target: Any) -> None:
    settings = {**clusters.BASE, "replicas": 2, "api_keys": ["sesame-open"]}
    assert "sesame" not in "".join(clusters.files(target, settings).values())


@pytest.mark.parametrize("target", TARGETS)
def test_files_are_the_same_each_time(target: Any) -> None:
    assert clusters.files(target) == clusters.files(target)


@pytest.mark.parametrize("target", TARGETS)
def test_files_are_the_golden_ones(target: Any) -> None:
    """KERVAN_WRITE_GOLDEN=1 writes them anew; look at the difference before it is committed."""
    made, folder = clusters.files(target), DATA / "cluster" / target
    if os.environ.get("KERVAN_WRITE_GOLDEN") == "1":
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, text in made.items():
            (folder / name).write_text(text)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made


# ---- Ray's launcher


def ray_schema() -> jsonschema.Draft202012Validator:
    (path,) = [path for path in metadata.files("ray") or [] if path.name == "ray-schema.json"]
    return jsonschema.Draft7Validator(json.loads(Path(path.locate()).read_text()))


def launched(target: Any, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(clusters.files(target, **changes)["cluster.yaml"])
    return found


@pytest.mark.parametrize("target", LAUNCHER_TARGETS)
def test_rays_schema_takes_the_launchers_file(target: Any) -> None:
    made = launched(target)
    assert told(ray_schema(), made) == []
    assert made["head_node_type"] in made["available_node_types"]
    assert told(ray_schema(), {**made, "worker": {}})
    made["available_node_types"]["head"]["labels"] = {"ray.io/market-type": 1}
    assert told(ray_schema(), made)


@pytest.mark.parametrize("target", LAUNCHER_TARGETS)
def test_each_node_type_has_one_market_which_its_label_says(target: Any) -> None:
    types = launched(target)["available_node_types"]
    for name, one in types.items():
        if name == "head":
            assert "labels" not in one
            continue
        market = one["labels"]["ray.io/market-type"]
        assert name.startswith(market)
        text = json.dumps(one["node_config"]).lower()
        assert ("spot" in text) == (market == "spot")


def test_a_node_type_for_each_zone_and_the_least_divided_over_them() -> None:
    pools = {"on-demand": "12..16", "spot": "0..6"}  # 12 replicas on 2 GPUs: 3 nodes of 8
    types = launched("ray-aws", settings={**clusters.BASE, "pools": pools})["available_node_types"]
    on_demand = {name: one["min_workers"] for name, one in types.items() if name.startswith("on-demand")}
    assert on_demand == {"on-demand-us-west-2a": 2, "on-demand-us-west-2b": 1}
    spot = types["spot-us-west-2b"]
    assert (spot["min_workers"], spot["max_workers"], spot["priority"]) == (0, 2, 10)
    assert spot["labels"]["ray.io/availability-zone"] == "us-west-2b"
    assert spot["node_config"]["SubnetIds"] == ["subnet-0b"]
    assert spot["node_config"]["InstanceMarketOptions"]["SpotOptions"] == {"SpotInstanceType": "one-time"}


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("ray-aws", {"region": ""}, "--target ray-aws needs a region; write for example --region us-west-2"),
        ("ray-azure", {"machine": Machine(gpus=8)}, "--instance Standard_ND96isr_H100_v5"),
        ("ray-aws", {"zones": (Zone("us-west-2a"),)}, "write --zone us-west-2a=subnet-0123456789abcdef0"),
        ("ray-azure", {"zones": (Zone("1", "subnet-0"),)}, "a subnet is of AWS; write --zone 1"),
        ("ray-gcp", {"zones": (Zone("a"), Zone("b"))}, "with 2 zones: on Google Cloud Ray starts all nodes"),
        ("ray-gcp", {"zones": ()}, "give one, like --zone us-central1-a"),
        ("ray-gcp", {"project": ""}, "needs the project; write for example --project my-project-123"),
    ],
)
def test_what_a_cloud_cannot_do_is_told_with_the_fix(target: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        clusters.files(target, **changes)


# ---- Slurm


def sbatch(**changes: Any) -> str:
    return clusters.files("slurm", **changes)["kervan.sbatch"]


def test_slurm_is_asked_for_the_nodes_of_the_fleet_and_for_a_signal_in_time() -> None:
    # 6 replicas on 2 GPUs, 2 on a node of 4; 60 s for the streams, 30 for Ray, 30 spare
    text = sbatch(settings={**clusters.BASE, "replicas": 6}, partition="gpu", time_limit_min=3 * 24 * 60 + 90)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    assert options["nodes"] == "3"
    assert options["gpus-per-node"] == "4"
    assert options["partition"] == "gpu"
    assert options["time"] == "3-01:30:00"
    assert options["signal"] == "B:TERM@120"


@pytest.mark.parametrize("tool", [("bash", "-n"), ("shellcheck", "--severity=style")], ids=lambda tool: tool[0])
def test_shells_take_the_batch_script(tool: tuple[str, str], tmp_path: Path) -> None:
    program = shutil.which(tool[0]) or shutil.which(tool[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"no {tool[0]} on this machine")
    path = tmp_path / "kervan.sbatch"
    path.write_text(sbatch())
    done = subprocess.run([program, tool[1], path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


STANDINS = {
    # A cluster of two nodes on this machine: each command says what it was, in order.
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "hostname": "echo 127.0.0.1",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "python": 'grep -c "^head starts\\|^worker starts" "$TOLD" || true',
    "ray": (
        'case $* in *health-check*) exec grep -qs "head starts" "$TOLD";; *--head*) what=head;; *) what=worker;; esac\n'
        'trap \'echo "$what ends" >>"$TOLD"; exit 0\' TERM\n'
        'echo "$what starts" >>"$TOLD"\nwhile :; do sleep 0.05; done'
    ),
    "kervan": (
        'trap \'echo "fleet ends" >>"$TOLD"; exit 0\' TERM\necho "fleet starts: $*" >>"$TOLD"\n'
        'kill -TERM "$PPID"; while :; do sleep 0.05; done'
    ),
}


def test_the_batch_job_starts_in_order_and_ends_in_order_at_slurms_signal(tmp_path: Path) -> None:
    """With stand-ins for Slurm's and Ray's commands; the script is the real one. The fleet sends it Slurm's signal."""
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    made = clusters.files("slurm", {**clusters.BASE, "replicas": 4})
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    told_path = tmp_path / "told"
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "TOLD": str(told_path), "KERVAN_API_KEY": "k",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", tmp_path / "kervan.sbatch"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 143, done.stderr
    lines = told_path.read_text().splitlines()
    assert sorted(lines[:2]) == ["head starts", "worker starts"]
    assert lines[2] == f"fleet starts: up --config {tmp_path}/fleet.yaml --name chat --address 127.0.0.1:20007"
    assert lines[3:] == ["fleet ends", "worker ends", "head ends"]


@pytest.mark.parametrize(
    ("missing", "words"),
    [("KERVAN_API_KEY", "set KERVAN_API_KEY before sbatch"), ("fleet.yaml", "submit from the directory that has it")],
)
def test_the_batch_job_says_what_it_lacks(missing: str, words: str, tmp_path: Path) -> None:
    for name, text in clusters.files("slurm").items():
        if name != missing:
            (tmp_path / name).write_text(text)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    if missing != "KERVAN_API_KEY":
        environment["KERVAN_API_KEY"] = "k"
    done = subprocess.run(
        ["bash", tmp_path / "kervan.sbatch"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert words in done.stderr


# ---- one machine


def compose(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(clusters.files("compose", **changes)["compose.yaml"])
    return found


def test_the_compose_specification_takes_the_file() -> None:
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    checker = jsonschema.Draft202012Validator(schema)
    made = compose(extras=frozenset(["dcgm"]))
    assert told(checker, made) == []
    made["services"]["fleet"]["healthchek"] = {}
    assert told(checker, made)


def test_a_compose_service_listens_on_loopback_ends_in_time_and_tells_its_health() -> None:
    fleet = compose()["services"]["fleet"]
    assert fleet["ports"] == ["127.0.0.1:8000:8000"]
    assert fleet["stop_grace_period"] == "120s"
    assert fleet["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/health/ready"
    tls = {"tls_certificate": "/tls/c.pem", "tls_key": "/tls/k.pem"}
    encrypted = yaml.safe_load(clusters.files("compose", {**clusters.BASE, **tls})["compose.yaml"])["services"]["fleet"]
    assert encrypted["healthcheck"]["test"][-1] == "https://127.0.0.1:8000/health/ready"
    assert {one["target"] for one in encrypted["volumes"]} >= set(tls.values())
    assert fleet["environment"]["KERVAN_API_KEY"].startswith("${KERVAN_API_KEY:?")
    (device,) = fleet["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (4, ["gpu"])
    public = compose(settings={**clusters.BASE, "replicas": 2, "host": "0.0.0.0"})["services"]["fleet"]
    assert public["ports"] == ["0.0.0.0:8000:8000"]


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        ("compose", {**clusters.BASE, "replicas": 3}, "the fleet needs 2 with 4 GPUs each"),
        ("compose", clusters.WITH_SPOT, "the fleet has a spot pool; use --target kuberay"),
        ("slurm", clusters.WITH_SPOT, "write --replicas 10 in place of --pool"),
    ],
)
def test_one_machine_takes_no_more_than_fits(target: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        clusters.files(target, settings)


def test_several_machines_get_a_unit_for_the_head_and_for_each_market() -> None:
    made = clusters.files("systemd")
    assert sorted(made) == [
        "chat.yaml", "kervan-chat.service", "kervan-ray-head.service", "kervan-ray-on-demand.service",
        "kervan-ray-spot.service",
    ]  # fmt: skip
    assert "--labels=ray.io/market-type=spot" in made["kervan-ray-spot.service"]
    assert "Requires=kervan-ray-head.service" in made["kervan-chat.service"]
    alone = clusters.files("systemd", {**clusters.BASE, "replicas": 4})
    assert sorted(alone) == ["chat.yaml", "kervan-chat.service"]
    assert "--address" not in alone["kervan-chat.service"]
    assert "TimeoutStopSec=120" in alone["kervan-chat.service"]


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def verify(made: dict[str, str]) -> str:
        units = []
        for name, text in made.items():
            if name.endswith(".service"):
                # kervan is not in /opt here, and its user does not exist.
                startable = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", text, flags=re.M)
                (tmp_path / name).write_text(re.sub(r"^(User|Group)=.*\n", "", startable, flags=re.M))
                units.append(tmp_path / name)
        done = subprocess.run(
            [analyze, "verify", "--man=no", *units],
            capture_output=True, text=True, timeout=60, check=False, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        )  # fmt: skip
        return "\n".join(line for line in done.stderr.splitlines() if "kervan" in line)

    made = clusters.files("systemd")
    assert verify(made) == ""
    made["kervan-chat.service"] = made["kervan-chat.service"].replace("TimeoutStopSec=120", "TimeoutStopSec=soon")
    assert "Failed to parse time value" in verify(made)
