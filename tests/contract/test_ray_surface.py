"""What kervan relies on inside Ray that Ray does not promise to keep: `kervan/serve/ray_internals.py` has its uses.

Each name is looked up in the installed release, with the parameters it is called with. Nothing is started.
"""

import ast
import inspect
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cluster_utils
from ray._private import node, parameter, ray_constants, state, worker
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import (
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    InnerGcsClient,
    get_authentication_mode,
    is_k8s_token_auth_enabled,
)
from ray.core.generated import autoscaler_pb2
from ray.dashboard.modules.reporter import reporter_consts
from ray.exceptions import AuthenticationError
from ray.experimental import internal_kv
from ray.serve._private import client, constants, controller, replica
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_scheduler import DeploymentDownscaleRequest, DeploymentScheduler
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.deployment import Deployment

import kervan
from kervan.serve import ray_auth, ray_internals
from kervan.serve.gateway_actor import IngressGatewayReplica
from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

PACKAGE = Path(kervan.__file__).parent


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (internal_kv._internal_kv_get, ["key", "namespace"]),
        (internal_kv._internal_kv_put, ["key", "value", "overwrite", "namespace"]),
        (internal_kv._internal_kv_del, ["key", "del_by_prefix", "namespace"]),
        (state.available_resources_per_node, []),
        (state.state.get_draining_nodes, []),
        (InnerGcsClient.drain_node, ["node_id", "reason", "reason_message", "deadline_timestamp_ms", "timeout"]),
        (_get_global_client, ["raise_if_no_controller_running"]),
        (cluster_utils.Cluster.add_node, ["wait", "node_args"]),
        (cluster_utils.Cluster._wait_for_node, ["node", "timeout"]),
        (cluster_utils.Cluster.remove_node, ["node", "allow_graceful"]),
        (cluster_utils.Cluster.shutdown, []),
        (node.Node.live_processes, []),
        (canonicalize_bootstrap_address, ["addr", "temp_dir"]),
        (
            ray_internals.serves_own_choice(),
            ["deployment_id", "max_num_to_stop", "gang_id_by_replica", "replicas_by_gang_id", "gang_size"],
        ),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_functions_take_what_they_are_given(function: Callable[..., Any], expected: list[str]) -> None:
    assert parameters(function) == expected


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (worker, "_worker_logs_enabled"),
        (worker, "global_worker"),
        (client.ServeControllerClient, "http_config"),
        (controller.ServeController, "get_proxy_location"),
        (ProxyLocation, "Disabled"),
        (cluster_utils.Cluster, "address"),
        (ray.PlacementGroupID, "from_hex"),
        (InnerGcsClient, "get_all_node_info"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_names_exist(owner: Any, name: str) -> None:
    assert hasattr(owner, name)


def test_a_nodes_drain_cannot_be_refused_for_being_busy() -> None:
    assert autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")


def test_options_and_variables_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    (option,) = ray_internals.VERSION_OPTIONS
    assert {option, "version"} <= set(parameters(Deployment.options))
    assert f'kwargs.pop("{ray_internals.TEMP_DIR_OPTION}"' in inspect.getsource(worker.init)
    assert ray_constants.RAY_WORKER_NICENESS == ray_internals.NICENESS_VARIABLE
    assert {"include_log_monitor", "no_monitor"} <= set(parameters(parameter.RayParams.__init__))
    source = inspect.getsource(node.Node.start_api_server)
    assert "= ray._private.services.start_api_server(" in source
    assert "if process_info is not None:" in source  # it may not have started
    assert "ray._private.parameter.RayParams(" in inspect.getsource(worker.init)
    assert f'"{ray_internals.REPORTER_VARIABLE}"' in inspect.getsource(reporter_consts)
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert ray_internals.PRESTART_VARIABLE.encode() in raylet.read_bytes()
    source = inspect.getsource(constants)
    haproxy = (ray_internals.HAPROXY_VARIABLE, *ray_internals.HAPROXY_PORT_VARIABLES)
    for variable in (ray_internals.CONTROL_LOOP_VARIABLE, ray_internals.DRAINING_VARIABLE, *haproxy):
        assert f'"{variable}"' in source
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for value, is_on in (("0", False), ("true", True), ("1", True), ("", False)):
        monkeypatch.setenv(ray_internals.KUBERNETES_AUTH_VARIABLE, value)
        Config.initialize("")
        assert bool(is_k8s_token_auth_enabled()) == is_on


@pytest.mark.parametrize("mode", ["", "Token", "disabled", "nonsense"])
@pytest.mark.parametrize("token", ["", " a\n"])
@pytest.mark.parametrize("path", ["", "full", "blank", "missing"])
@pytest.mark.parametrize("is_at_home", [True, False])
def test_a_token_is_found_as_ray_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, token: str, path: str, is_at_home: bool
) -> None:
    (tmp_path / "full").write_text("b\n")
    (tmp_path / "blank").write_text("\n")
    if is_at_home:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("c")
    given = {
        "RAY_AUTH_MODE": mode,
        "RAY_AUTH_TOKEN": token,
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / path) if path else "",
    }
    for name, value in {**given, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        found = loader.has_token(ignore_auth_mode=True)
    except AuthenticationError:  # where the settings name a token, there is none
        found = False
    loader.reset_cache()
    assert found == ray_auth.has_token(os.environ)
    Config.initialize("")
    assert (get_authentication_mode() == AuthenticationMode.TOKEN) == ray_auth.sends_token(os.environ)


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    yield
    Config.initialize("")


def test_serve_asks_a_gateway_for_its_app() -> None:
    assert replica.SERVE_BUILD_ASGI_APP_METHOD == ray_internals.BUILD_APP_METHOD
    assert hasattr(IngressGatewayReplica, ray_internals.BUILD_APP_METHOD)


def test_the_client_of_serve_has_its_controller() -> None:
    assert "self._controller" in inspect.getsource(client.ServeControllerClient.__init__)


@pytest.mark.parametrize("method", ["__init__", "__del__"])
def test_serve_awaits_how_a_replica_begins_and_ends(method: str) -> None:
    """An engine replica's are coroutines: the one may take minutes, and the other must be heard meanwhile."""
    pattern = rf"await self\._call_func_or_gen\(\s*self\._callable\.{method},"
    assert re.search(pattern, inspect.getsource(replica))


class Scheduler(DeploymentScheduler):  # type: ignore[misc]
    """Serve's own, with the replicas that the test gives it, on one node: the first ones are the oldest."""

    def __init__(self, running: str, launching: str = "", recovering: str = "") -> None:
        self.deployment = DeploymentID("on-demand", "kervan-chat")
        kinds = {"_running_replicas": running, "_launching_replicas": launching, "_recovering_replicas": recovering}
        for name in ("_pending_replicas", *kinds):
            ids = [ReplicaID(letter, self.deployment) for letter in kinds.get(name, "")]
            setattr(self, name, {self.deployment: dict.fromkeys(ids, "node")})
        self._recovering_replicas = {name: set(ids) for name, ids in self._recovering_replicas.items()}
        self._deployments = {self.deployment: SimpleNamespace(label_selector={}, bundle_label_selector=[])}
        self._cluster_node_info_cache = SimpleNamespace(get_node_labels=lambda node: {})
        self._head_node_id = "head"

    def stops(self, count: int) -> str:
        """Those that go when so many are to go, as Serve asks for it."""
        request = DeploymentDownscaleRequest(self.deployment, count)
        self._use_pack_strategy = lambda: False
        self._schedule_with_spread_strategy = lambda: None
        (stopped,) = self.schedule({}, {self.deployment: request}).values()
        return "".join(sorted(replica_id.unique_id for replica_id in stopped))


@pytest.mark.parametrize(
    ("scheduler", "order", "count", "stopped"),
    [
        pytest.param(Scheduler("abcd"), [], 1, "d", id="without a word of ours Serve stops the newest"),
        pytest.param(Scheduler("abcd"), ["b", "d", "a", "c"], 1, "b", id="ours, whatever its age"),
        pytest.param(Scheduler("abcd"), ["b", "d", "a", "c"], 3, "abd", id="several, in our order"),
        pytest.param(Scheduler("ab", launching="c"), ["b", "a"], 1, "c", id="one that nobody has heard of goes first"),
        pytest.param(Scheduler("ab", launching="c"), ["b", "c", "a"], 1, "b", id="one that we know waits for its turn"),
        pytest.param(Scheduler("a", recovering="bc"), ["a", "c", "b"], 1, "a", id="found again, and not to leave"),
        pytest.param(Scheduler("abcd"), ["b"], 2, "bd", id="what we do not name is as Serve has it"),
        pytest.param(Scheduler("ab"), ["gone", "b", "a"], 1, "b", id="one that is gone does not count"),
    ],
)
def test_the_fleet_chooses_who_stops(
    monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler, order: list[str], count: int, stopped: str
) -> None:
    monkeypatch.setattr(DeploymentScheduler, "_get_replicas_to_stop", ray_internals.serves_own_choice())
    ray_internals.let_choose_who_stops(lambda app_name: {"kervan-chat": order}[app_name])
    ray_internals.let_choose_who_stops(lambda app_name: {"kervan-chat": order}[app_name])  # Serve asks each second
    assert scheduler.stops(count) == stopped


def test_serve_chooses_when_the_choice_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeploymentScheduler, "_get_replicas_to_stop", ray_internals.serves_own_choice())

    def fail(app_name: str) -> list[str]:
        raise RuntimeError("nobody knows")

    ray_internals.let_choose_who_stops(fail)
    assert Scheduler("abcd").stops(1) == "d"


def private_uses(path: Path) -> list[str]:
    """Dotted names of Ray with a part that starts with one underscore, and of `ray.experimental` and `ray.core`."""
    found = []
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.ImportFrom):
            found += [f"{part.module}.{alias.name}" for alias in part.names]
        elif isinstance(part, ast.Import):
            found += [alias.name for alias in part.names]
        elif isinstance(part, ast.Attribute):
            found.append(ast.unparse(part))
    pattern = re.compile(r"ray\.(.*\.)?(_[a-z]\w*|experimental|core|cluster_utils)\b")
    return [name for name in found if pattern.match(name)]


def test_no_other_module_uses_them() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if private_uses(path)}
    assert users == {"serve/ray_internals.py"}


def test_the_code_of_rays_router_by_prefix_decides_in_a_simulation() -> None:
    """`benchmarks/prefix_policies.py` calls it without actors."""
    import prefix_policies

    twin = TwinSettings(
        StepTiming(base_s=0.01, prefill_token_s=1e-4, sequence_s=0.0, context_token_s=0.0), TwinLimits(num_blocks=9000)
    )
    sim = prefix_policies.Simulation(prefix_policies.WAYS["ray"](), replicas=2, gateways=1, twin=twin, seed=1)
    rng = random.Random(3)
    talks = [prefix_policies.talk(rng, f"{n}", turns=3, isl=320, osl=32, varies=False) for n in range(6)]
    prefix_policies.closed(sim, talks, 3)
    sim.run()
    assert len(sim.done) == 18
    assert sim.figures()["of_possible"] == 1  # it never leaves the replica that has most
