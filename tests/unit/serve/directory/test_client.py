"""The client of the directory over the actor's own code, with the calls in this process in place of Ray's."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import ray
from msgspec import structs
from ray.exceptions import ActorDiedError, GetTimeoutError

from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import Drain, GatewayEntry, NodeEntry, ReplicaEntry, Snapshot, StartFailure, Strike
from kervan.serve import ray_internals
from kervan.serve.directory.actor import DirectoryActor
from kervan.serve.directory.client import DirectoryClient, find_directory, fleet_names

CONFIG = FleetConfig(model="org/model", name="chat", replicas=2)
REPLICA = ReplicaEntry("a", "on-demand", "10.0.0.1", 7, "ready", address="tcp://h:1")
GATEWAY = GatewayEntry("g", "10.0.0.1", 8, "http://h:1", "http://h:2", True)
DOES_NOT_ANSWER = "the directory of fleet 'chat' does not answer"


class Reference:
    """A response under way, as Ray's ObjectRef: it can be awaited, and `ray.get` waits for it."""

    def __init__(self, response: Coroutine[Any, Any, Any]):
        self._response = response

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response.__await__()

    def get(self, timeout_s: float | None) -> Any:
        try:
            return asyncio.run(asyncio.wait_for(self._response, timeout_s))
        except TimeoutError as error:
            raise GetTimeoutError("Get timed out") from error


class LocalActor:
    """A handle of a directory in this process. While `error` is set, its calls fail with it."""

    def __init__(self) -> None:
        self.directory = DirectoryActor.__new__(DirectoryActor)
        begin: Any = self.directory.__init__  # type: ignore[misc]
        with ThreadPoolExecutor(1) as threads:  # Ray awaits it; what it begins ends with the loop
            threads.submit(lambda: asyncio.run(begin(CONFIG.name, CONFIG.to_json(), "secret"))).result()
        self.error: BaseException | None = None

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.error is not None:
                raise self.error
            return await getattr(self.directory, method)(*arguments)

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Reference:
                return Reference(call(*arguments))

        return Method


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Ray's own store, and its `get`."""
    values: dict[str, bytes] = {}
    monkeypatch.setattr(ray_internals, "kv_get", values.get)
    monkeypatch.setattr(ray_internals, "kv_put", values.__setitem__)
    monkeypatch.setattr(ray, "get", lambda reference, *, timeout=None: reference.get(timeout))
    return values


@pytest.fixture
def actor(store: dict[str, bytes]) -> LocalActor:
    return LocalActor()


@pytest.fixture
def directory(actor: LocalActor) -> DirectoryClient:
    return DirectoryClient(CONFIG.name, actor)


async def test_what_is_told_is_in_the_snapshot(directory: DirectoryClient) -> None:
    assert await directory.fleet() == (CONFIG, "secret", "")
    assert await directory.beat_replica(REPLICA) == []
    assert await directory.beat_gateway(GATEWAY) is None
    assert (await directory.beat_node(NodeEntry("10.0.0.1"))).nodes == [NodeEntry("10.0.0.1")]
    await directory.report_failure(StartFailure("b", "EngineError", "broke"))
    snapshot = await directory.snapshot()
    aged = [structs.replace(entry, beat_age_s=0.0) for entry in (*snapshot.replicas, *snapshot.gateways)]
    assert aged == [REPLICA, GATEWAY]
    assert [failure.number for failure in snapshot.failures] == [1]
    assert (await directory.set_closing(True)).is_closing
    assert not (await directory.set_closing(False)).is_closing
    await directory.remove("a")
    assert (await directory.snapshot()).replicas == []


async def test_another_generation_of_keys_has_a_secret_of_its_own_and_the_one_before_counts_for_a_while(
    directory: DirectoryClient, store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = replace(CONFIG, key_generation=1)
    await directory.set_config(renewed)
    _, secret, before = await directory.fleet()
    assert len(secret) == 64
    assert before == "secret"
    again = DirectoryClient(CONFIG.name, LocalActor())  # Ray has restarted it, with the arguments of its first start
    assert await again.fleet() == (renewed, secret, "secret")
    await directory.set_config(CONFIG)  # the change has failed
    assert await directory.fleet() == (CONFIG, "secret", secret)
    await directory.set_config(renewed)
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 3601)
    assert await directory.fleet() == (renewed, secret, "")


async def test_orders_come_with_the_next_beat(directory: DirectoryClient) -> None:
    assert not await directory.order("a", Strike("kill"))
    await directory.beat_replica(REPLICA)
    for order in (Strike("hang"), Drain(9.0, may_linger=True)):
        assert await directory.order("a", order)
    assert await directory.beat_replica(REPLICA) == [Strike("hang"), Drain(9.0, may_linger=True)]
    assert await directory.beat_replica(REPLICA) == []


async def test_new_settings_outlive_the_directory(directory: DirectoryClient) -> None:
    larger = FleetConfig(model="org/model", name="chat", replicas=3)
    version = (await directory.snapshot()).version
    await directory.set_config(larger)
    assert (await directory.snapshot()).version != version
    assert (await DirectoryClient(CONFIG.name, LocalActor()).fleet()).config == larger


def test_a_command_blocks_on_the_result(directory: DirectoryClient) -> None:
    assert directory.fleet().result().config == CONFIG
    assert directory.snapshot().result().replicas == []
    version = directory.snapshot().result().version
    assert directory.changed(version - 1, 30.0).result().version == version
    with pytest.raises(FleetError, match=f"{DOES_NOT_ANSWER}.*no answer for 0 s.*try again in a few seconds"):
        directory.changed(version, 30.0).result(timeout_s=0.01)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ConnectionError("GCS"), RuntimeError("Ray has not been started")], ids=repr
)
async def test_what_ray_raises_is_a_fleet_error(
    directory: DirectoryClient, actor: LocalActor, error: BaseException
) -> None:
    actor.error = error
    with pytest.raises(FleetError, match=DOES_NOT_ANSWER):
        await directory.snapshot()
    with pytest.raises(FleetError, match=DOES_NOT_ANSWER):
        await asyncio.to_thread(lambda: directory.snapshot().result())


async def test_who_waits_for_a_limited_time_hears_that_it_is_over(directory: DirectoryClient) -> None:
    version = (await directory.snapshot()).version
    with pytest.raises(FleetError, match=f"{DOES_NOT_ANSWER}.*TimeoutError"):
        await directory.changed(version, 30.0).within(0.01)


async def after(seconds: float, action: Callable[[], Awaitable[Any]]) -> None:
    await asyncio.sleep(seconds)
    await action()


async def test_a_follower_hears_of_changes_at_once_and_of_the_rest_after_a_while(directory: DirectoryClient) -> None:
    seen: list[Snapshot] = []
    changing = asyncio.create_task(after(0.2, lambda: directory.beat_replica(REPLICA)))
    async with asyncio.timeout(10):
        async for snapshot in directory.follow(poll_s=0.5):
            seen.append(snapshot)
            if len(seen) == 3:
                break
    await changing
    assert [len(snapshot.replicas) for snapshot in seen] == [0, 1, 1]
    assert seen[1].version == seen[2].version


async def test_a_follower_waits_for_a_directory_that_is_away(
    directory: DirectoryClient, actor: LocalActor, caplog: pytest.LogCaptureFixture
) -> None:
    actor.error = ActorDiedError()

    async def come_back() -> None:
        actor.error = None

    coming_back = asyncio.create_task(after(0.1, come_back))
    async with asyncio.timeout(10):
        async for snapshot in directory.follow(poll_s=0.5, retry_s=0.01):
            assert snapshot.replicas == []
            break
    await coming_back
    assert DOES_NOT_ANSWER in caplog.text


async def test_a_follower_that_does_not_wait_is_told(directory: DirectoryClient, actor: LocalActor) -> None:
    actor.error = ActorDiedError()
    with pytest.raises(FleetError, match=DOES_NOT_ANSWER):
        async for _ in directory.follow(poll_s=0.5):
            pass


NAMED = [
    {"name": "directory-b", "namespace": "kervan"},
    {"name": "directory-a", "namespace": "kervan"},
    {"name": "directory-c", "namespace": "other"},
    {"name": "watcher-1", "namespace": "kervan"},
]


def test_fleets_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, *, namespace: str) -> str:
        if {"name": name, "namespace": namespace} not in NAMED:
            raise ValueError("no such actor")
        return name

    monkeypatch.setattr(ray.util, "list_named_actors", lambda *, all_namespaces: NAMED)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    assert fleet_names() == ["a", "b"]
    assert find_directory("a").fleet_name == "a"
    with pytest.raises(FleetError, match=r"no fleet 'c' runs on this cluster; fleets here: a, b \(--name\)"):
        find_directory("c")


def test_a_ray_that_is_away_is_no_missing_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("GCS")

    monkeypatch.setattr(ray.util, "list_named_actors", away)
    monkeypatch.setattr(ray, "get_actor", away)
    for ask in (fleet_names, lambda: find_directory("a")):
        with pytest.raises(FleetError, match=r"Ray did not .*GCS.*try again"):
            ask()
