"""Plays a trace of nodes that come and go on a Ray cluster of its own, under a trace of requests."""

import asyncio
import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from kervan.bench import drive
from kervan.bench.load import Endpoint
from kervan.bench.load_client import LoadClient, Share
from kervan.chaos.checked_load import RepeatedTrace
from kervan.chaos.checked_run import CheckedRun, KnownPrompts, Say, known_prompts_of_twins, probe
from kervan.chaos.effects import Disruption
from kervan.chaos.fleet_under_test import FleetOnRay, FleetUnderTest
from kervan.chaos.plans import ReplayPlan
from kervan.chaos.report import ChaosReport, NodeHistory
from kervan.chaos.schedule import DisruptionKind
from kervan.config import fleet as facts
from kervan.config.fleet import FleetConfig
from kervan.config.node_trace import NodeChange, NodeTrace
from kervan.config.workload import Slo, read_trace
from kervan.errors import FleetError, KervanError
from kervan.facts.markets import MARKETS, ON_DEMAND, SPOT
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.ports import free_port
from kervan.serve import cluster, start
from kervan.serve.attach import attach
from kervan.serve.local_nodes import LocalNodes
from kervan.twin import settings as twins
from kervan.units import plural

GPU = "H200"
# Slow steps: answers live for seconds, so a node that goes has streams, and two cores can serve them.
STEP_S = 0.03
KV_TOKENS = 2**20
ON_DEMAND_BOUNDS = "1..2"
FALLBACK_AFTER_S = 15.0  # the defaults of a fleet; here they pass as fast as the trace
FALLBACK_HOLD_S = 300.0
MIN_FALLBACK_AFTER_S = 1.0
READY_TIMEOUT_S = 300.0


class SpotNodes(Protocol):
    """The cluster's spot nodes, by address. Calls block. Raises: KervanError."""

    def add(self, ip: str) -> None:
        """A node comes; returns when Ray knows it."""

    def drain(self, ip: str, deadline_s: float) -> None:
        """Ray places nothing there any more; the node will go within `deadline_s`."""

    def remove(self, ip: str) -> None:
        """A node goes, with all its processes."""


def fleet_config(model: str, plan: ReplayPlan, name: str, port: int) -> FleetConfig:
    """Twins: one or two on demand, and one on each spot node."""
    settings: dict[str, Any] = {
        "model": model,
        "name": name,
        "port": port,
        "engine": "twin",
        "gpu": GPU,
        "twin": {"base_s": STEP_S, "kv_tokens": KV_TOKENS, "spot_per_node": 1},
        "pools": {ON_DEMAND: ON_DEMAND_BOUNDS, SPOT: f"0..{plan.max_nodes}"},
        "policy": "fill",
        "gateways": 1,
        "fallback_after_s": max(MIN_FALLBACK_AFTER_S, FALLBACK_AFTER_S / plan.speed),
        "fallback_hold_s": FALLBACK_HOLD_S / plan.speed,
    }
    return facts.from_mapping(settings, "kervan chaos --replay")


def run(model: str, plan: ReplayPlan, say: Say) -> ChaosReport:
    """Start a Ray cluster and a fleet, play the traces, end all. Blocks; Ctrl-C ends it early, with the report.

    Raises: ConfigError before anything is started; KervanError when the cluster or the fleet does not start.
    """
    course = plan.course()
    for _ in read_trace(Path(plan.trace)):
        pass  # a broken row is told now, not in the middle
    config = start.validate(fleet_config(model, plan, f"replay-{os.getpid()}", free_port()))
    drive.raise_file_limit()
    say("starting a separate Ray cluster on this machine")
    nodes = LocalNodes()
    try:
        nodes.join()
        say("starting the fleet, then the first spot nodes")
        status = start.Startup(config, nodes.address, say).run()
        directory = attach(config.name, nodes.address)
        config = directory.fleet().result().config
        models = directory.snapshot().result().gateways[0].models
        replay = ReplayRun(FleetOnRay(config.name, config, models, directory), config, plan, course, nodes, say)
        replay.prepare()
        return replay.run_to_end(Endpoint(url=status.url, model=models[0]))
    finally:
        nodes.close()
        cluster.forget(config.name)


class ReplayRun(CheckedRun):
    """The nodes' changes under an open loop. A node that is there at 0 is so before the load begins (`prepare`)."""

    def __init__(
        self,
        fleet: FleetUnderTest,
        config: FleetConfig,
        plan: ReplayPlan,
        course: NodeTrace,
        nodes: SpotNodes,
        say: Say,
    ) -> None:
        super().__init__(fleet, config, plan, ["drain" if plan.deadline_s else "kill"], say)
        self._plan, self._course, self._nodes = plan, course, nodes
        self._there: dict[str, str] = {}  # address by name, of nodes that stay for now
        self._num_added = self._num_removed = 0
        self._begin_s = math.inf
        self._over_time: list[dict[str, float]] = []
        self._arrivals: RepeatedTrace | None = None
        self._has_seen = asyncio.Event()

    def prepare(self) -> None:
        """Add the nodes of the beginning, and wait for what can be on them. Raises: KervanError."""
        for change in self._course.changes:
            if change.at_s == 0 and change.word == "add":
                for node in change.nodes:
                    self._nodes.add(self._new_address(node))
        bound_s = time.monotonic() + READY_TIMEOUT_S
        snapshot = self._fleet.look(-1, 0.0)
        while (ready := _ready_by_pool(snapshot))[SPOT] < len(self._there) or not ready[ON_DEMAND]:
            if time.monotonic() > bound_s:
                raise FleetError(
                    f"after {READY_TIMEOUT_S:.0f} s, {ready[SPOT]} of {plural(len(self._there), 'spot replica')} are "
                    "ready; use a smaller --max-nodes"
                )
            snapshot = self._fleet.look(snapshot.version, 1.0)

    def _new_address(self, node: str) -> str:
        """A loopback address that no node has had: Ray takes a while to forget one that was killed."""
        address = f"127.0.{1 + self._num_added // 250}.{1 + self._num_added % 250}"
        self._num_added += 1
        self._there[node] = address
        return address

    # ---- what a run is made of

    def _target(self) -> int:
        """A replica on each node, and on-demand ones for those that are missing, within their bounds."""
        bounds = self._config.bounds
        missing = bounds[SPOT].maximum - len(self._there)
        return len(self._there) + min(bounds[ON_DEMAND].maximum, bounds[ON_DEMAND].minimum + missing)

    def _nodes_seen(self) -> NodeHistory:
        return NodeHistory(
            nodes_added=self._num_added,
            nodes_removed=self._num_removed,
            over_time=self._over_time,
            requests_cut=self._arrivals.num_cut if self._arrivals else 0,
        )

    async def _known_prompts(self, endpoint: Endpoint) -> KnownPrompts:
        endpoint, _ = await probe(endpoint)
        return known_prompts_of_twins(self._config, endpoint)

    def _client(self, prompts: KnownPrompts) -> LoadClient:
        load = self._plan.load(self._course.end_s)
        self._arrivals = RepeatedTrace(load, twins.settings(self._config).limits.max_model_len)
        self._say(
            f"{plural(len(self._there), 'spot node')} at start; requests from {Path(self._plan.trace).name} for "
            f"{self._course.end_s:g} s"
        )
        share = Share(load, prompts.endpoint, prompts.alphabet, Slo())
        return LoadClient(share, arrivals=self._arrivals)

    # ---- the nodes

    async def _disturb(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._note()
        tasks: list[asyncio.Task[None]] = []
        try:
            for change in self._course.changes:
                if change.at_s > 0:
                    await asyncio.sleep(begin_s + change.at_s - time.time())
                    tasks += self._begin(change)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _begin(self, change: NodeChange) -> list["asyncio.Task[None]"]:
        if change.word == "add":
            return [asyncio.create_task(self._add(node, self._new_address(node))) for node in change.nodes]
        return [asyncio.create_task(self._take(node, self._there.pop(node))) for node in change.nodes]

    async def _add(self, node: str, address: str) -> None:
        self._say(f"{node} joins at {address}")
        self._note()
        await asyncio.to_thread(self._nodes.add, address)

    async def _take(self, node: str, address: str) -> None:
        """With a notice, the node goes when it is empty, at the latest at its deadline; else at once."""
        deadline_s = self._plan.deadline_s
        replicas = [r for r in self._snapshot.replicas if address in (r.node, *r.nodes)]
        self._num_removed += 1
        self._note()
        self._say(
            f"{node} at {address} {f'leaves in {deadline_s:g} s' if deadline_s else 'is killed'}, with "
            + (", ".join(f"{r.id} and its {plural(r.running, 'stream')}" for r in replicas) or "nothing on it")
        )
        for replica in replicas:
            if replica.state == "ready":
                number = len(self._disruptions)
                kind: DisruptionKind = "drain" if deadline_s else "kill"
                self._disruptions.append(Disruption(number, kind, replica.id, time.time(), replica.running))
        if deadline_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await self._drain(node, address, replicas)
        await asyncio.to_thread(self._nodes.remove, address)
        self._say(f"{node} has left")

    async def _drain(self, node: str, address: str, replicas: list[ReplicaEntry]) -> None:
        """Returns when the replicas are gone."""
        deadline_s = self._plan.deadline_s
        try:
            await asyncio.to_thread(self._nodes.drain, address, deadline_s)  # first, so that nothing new comes there
            for replica in replicas:
                await asyncio.to_thread(self._fleet.strike, "drain", replica.id, deadline_s)
        except KervanError as error:
            self._say(f"{node} could not be drained: {error}")
        while any(replica.id == listed.id for listed in self._snapshot.replicas for replica in replicas):
            self._has_seen.clear()
            await self._has_seen.wait()

    def _see(self, snapshot: Snapshot) -> None:
        super()._see(snapshot)
        self._note()
        self._has_seen.set()

    def _note(self) -> None:
        """Keep how many nodes and ready replicas there are now, if that has changed."""
        if math.isinf(self._begin_s):
            return
        now = {"nodes": len(self._there), **_ready_by_pool(self._snapshot)}
        if not self._over_time or {**self._over_time[-1], **now} != self._over_time[-1]:
            self._over_time.append({"at_s": round(time.time() - self._begin_s, 1), **now})


def _ready_by_pool(snapshot: Snapshot) -> dict[str, int]:
    ready = [replica.pool for replica in snapshot.replicas if replica.state == "ready"]
    return {pool: ready.count(pool) for pool in MARKETS}
