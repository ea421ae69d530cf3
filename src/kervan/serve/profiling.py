"""Records what one replica of a running fleet and the fleet's gateways do: what `kervan profile` calls.

The engine is asked through the fleet's directory, like one that is to drain. What is written on its node, and what only
its node can see, comes back from Ray tasks there. First torch's profiler runs, then py-spy: together they would measure
each other.
"""

import gzip
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kervan.config.fleet import FleetConfig
from kervan.config.profile import ENGINE_FILE, TRACE_FILE, ProfileAsk
from kervan.direct_http import NO_RESPONSE, reason
from kervan.errors import EngineError, FleetError
from kervan.fleet import pinned_tls
from kervan.fleet.auth import relay_key
from kervan.fleet.directory import GatewayEntry, Profile, ReplicaEntry, Snapshot
from kervan.gateway import ranges
from kervan.gateway.relay import RELAY_HEADER
from kervan.profile import py_spy
from kervan.serve import cluster
from kervan.serve.attach import attach

TASK_START_S = 60.0  # until Ray has a process for a task on a node
ORDER_S = 5.0  # until an order has reached the engine: a heartbeat, and a step
# Beyond the time asked for: torch's profiler starts and writes (`profiling.STANDSTILL_S` is what is thought long).
ENGINE_GRACE_S = 90.0
MAX_TRACE_BYTES = 1 << 30
POLL_S = 0.05


@dataclass(slots=True)
class Recording:
    """All that was recorded. `samples`: py-spy's stacks by process; `left_out`: what is missing, and why.

    `gateways`: what they told of the first half; `sampled_gateways`: of the half in which py-spy ran.
    """

    replica: str
    config: FleetConfig
    for_s: float
    engine: dict[str, Any] | None = None
    trace: bytes = b""
    gateways: list[dict[str, Any]] = field(default_factory=list)
    sampled_gateways: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def record(
    name: str,
    replica: str | None,
    *,
    for_s: float,
    max_steps: int,
    has_ranges: bool = True,
    has_samples: bool = True,
    address: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Recording:
    """Record for `for_s` seconds: half of it with torch's profiler and ranges, half with py-spy.

    `replica` None: the one with most running requests. Raises: FleetError when there is no such replica, or it is not
    ready.
    """
    directory = attach(name, address)
    from kervan.serve import node_tasks  # and Ray, which must know the cluster's token when it is imported

    stored = directory.fleet().result()
    snapshot = directory.snapshot().result()
    entry = choose(name, replica, snapshot)
    recording = Recording(entry.id, stored.config, for_s)
    node_ids = {ip: node_id for node_id, ip in cluster.nodes().items()}
    each_s = for_s / 2 if has_samples else for_s
    gateways = [gateway for gateway in snapshot.gateways if gateway.is_ready and not gateway.lateness]
    is_engine = stored.config.engine == "vllm"
    if not is_engine:
        recording.left_out.append("torch's profiler: the replicas are twins, which have no engine")
    progress(f"profiling {entry.id} and {len(gateways)} gateways for {for_s:g} s")
    place = f"{tempfile.gettempdir()}/kervan-profile-{uuid.uuid4().hex[:12]}"
    if is_engine:
        node_tasks.result(
            node_tasks.on_node(node_ids, entry.node, _make_directory, place), TASK_START_S, "a directory on its node"
        )
        directory.order(entry.id, Profile(ProfileAsk(place, each_s, max_steps, has_ranges))).result()
        engine = node_tasks.on_node(node_ids, entry.node, _collect, place, each_s + ORDER_S + ENGINE_GRACE_S)
    key = relay_key(stored.secret).decode()

    def asked(*, has_ranges: bool) -> list[tuple[GatewayEntry, Any]]:
        return [
            (
                gateway,
                node_tasks.on_node(node_ids, gateway.node, _ask_gateway, gateway.internal_url, key, each_s, has_ranges),
            )
            for gateway in gateways
        ]

    for gateway, task in asked(has_ranges=has_ranges):
        _take_gateway(recording, recording.gateways, gateway, task, each_s)
    if is_engine:
        _take_engine(recording, entry, engine, each_s)
    if has_samples:
        progress(f"sampling Python stacks for {each_s:g} s")
        told = asked(has_ranges=False)
        _sample(recording, node_ids, entry, gateways, each_s)
        for gateway, task in told:
            _take_gateway(recording, recording.sampled_gateways, gateway, task, each_s)
    return recording


def choose(name: str, replica: str | None, snapshot: Snapshot) -> ReplicaEntry:
    """The replica to profile. Raises: FleetError when there is none, or it is not ready."""
    ready = [entry for entry in snapshot.replicas if entry.state == "ready"]
    if replica is None:
        if not ready:
            raise FleetError(f"fleet {name!r} has no ready replica; kervan status --why says what it waits for")
        return max(ready, key=lambda entry: (entry.running, entry.id))
    found = next((entry for entry in snapshot.replicas if entry.id == replica), None)
    ids = ", ".join(entry.id for entry in ready) or "none"
    if found is None:
        raise FleetError(f"fleet {name!r} has no replica {replica!r}; ready are {ids}")
    if found.state != "ready":
        raise FleetError(f"replica {replica} is {found.state}; ready are {ids}")
    return found


def _take_gateway(
    recording: Recording, into: list[dict[str, Any]], gateway: GatewayEntry, task: Any, each_s: float
) -> None:
    from kervan.serve import node_tasks

    try:
        answer = node_tasks.result(task, each_s + TASK_START_S, f"gateway {gateway.id}")
    except FleetError as error:
        recording.left_out.append(f"gateway {gateway.id}: {error}")
        return
    into.append(json.loads(answer))


def _take_engine(recording: Recording, entry: ReplicaEntry, task: Any, each_s: float) -> None:
    from kervan.serve import node_tasks

    try:
        engine, trace = node_tasks.result(task, each_s + ORDER_S + ENGINE_GRACE_S + TASK_START_S, f"replica {entry.id}")
    except FleetError as error:
        recording.left_out.append(f"torch's profiler: {error}")
        return
    recording.engine, recording.trace = json.loads(engine), trace
    if recording.engine["problem"]:
        recording.left_out.append(f"torch's profiler: {recording.engine['problem']}")
    elif not trace:
        recording.left_out.append(f"torch's trace is over {MAX_TRACE_BYTES >> 30} GiB; profile fewer --steps")


def _sample(
    recording: Recording,
    node_ids: dict[str, str],
    entry: ReplicaEntry,
    gateways: list[GatewayEntry],
    each_s: float,
) -> None:
    from kervan.serve import node_tasks

    processes = [(f"replica {entry.id}", entry.node, entry.pid, True)]
    processes += [(f"gateway {gateway.id}", gateway.node, gateway.pid, False) for gateway in gateways]
    tasks = [
        (who, node_tasks.on_node(node_ids, node, _spy, pid, each_s, with_children))
        for who, node, pid, with_children in processes
    ]
    for who, task in tasks:
        try:
            recording.samples[who] = node_tasks.result(task, each_s + py_spy.GRACE_S + TASK_START_S, who)
        except FleetError as error:
            recording.left_out.append(f"Python stacks of {who}: {error}")


# ---- on the nodes


def _make_directory(place: str) -> None:
    Path(place).mkdir(mode=0o700)


def _collect(place: str, timeout_s: float) -> tuple[str, bytes]:
    """What the engine wrote: its own words, and torch's trace, compressed. The directory is gone afterwards."""
    directory = Path(place)
    try:
        deadline_s = time.monotonic() + timeout_s
        while not (told := directory / ENGINE_FILE).exists():
            if time.monotonic() > deadline_s:
                raise EngineError(f"the engine did not end its profile in {timeout_s:.0f} s; its log may say why")
            time.sleep(POLL_S)
        trace = directory / TRACE_FILE
        data = b""
        if trace.exists() and trace.stat().st_size <= MAX_TRACE_BYTES:
            os.nice(5)  # what serves comes first
            data = gzip.compress(trace.read_bytes(), compresslevel=3)
        return told.read_text(), data
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _ask_gateway(address: str, key: str, for_s: float, has_ranges: bool) -> bytes:
    path = f"{ranges.PATH}?for_s={for_s}&has_ranges={int(has_ranges)}"
    try:
        return pinned_tls.get(address, path, headers={RELAY_HEADER.decode(): key}, timeout_s=for_s + 30)
    except NO_RESPONSE as error:
        raise EngineError(f"it does not answer at {pinned_tls.split(address)[0]} ({reason(error)})") from error


def _spy(pid: int, for_s: float, with_children: bool) -> str:
    return py_spy.record(pid, for_s, with_children=with_children)
