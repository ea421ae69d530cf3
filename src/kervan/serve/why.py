"""Why a fleet is not as it should be, one sentence for each thing. Pure."""

import time
from collections.abc import Sequence

from kervan.config.fleet import FleetConfig
from kervan.facts.markets import ON_DEMAND
from kervan.fleet.directory import EXPIRY_S, Decided, Scaling, Snapshot
from kervan.serve import placement, pools
from kervan.serve.placement import NodeDevices


def explain(
    config: FleetConfig, snapshot: Snapshot, nodes: Sequence[NodeDevices], dead_nodes: Sequence[str]
) -> list[str]:
    """Sentences, the most important first; none for a fleet that is whole.

    `nodes`: alive nodes with their devices. `dead_nodes`: addresses of nodes that Ray has lost and that are not back.
    Ray remembers them for long, so they are told only while something is missing.
    """
    sentences = []
    if snapshot.scaling is not None and snapshot.scaling.problem:
        sentences.append(f"autoscaling ({snapshot.scaling.policy}): {snapshot.scaling.problem}")
    if snapshot.keys_problem:
        sentences.append(f"API keys: {snapshot.keys_problem}")
    present, least = len(snapshot.replicas), max(config.replicas, sum(snapshot.targets.values()))
    if config.pools:
        sentences += pools.explain(config, snapshot, nodes)
        on_demand = len(pools.replicas_of(ON_DEMAND, snapshot))
        present, least = on_demand, snapshot.targets.get(ON_DEMAND, config.bounds[ON_DEMAND].minimum)
        nodes = pools.of_pool(ON_DEMAND, nodes)
    if present < least:
        sentences.append(_missing(config, present, least, nodes))
    sentences += [
        f"{kind} {entry.id} is {entry.lateness}; it is dead, or node {entry.node} is overloaded or cut off; after "
        f"{EXPIRY_S:.0f} s without one it is listed no more"
        for kind, entries in (("replica", snapshot.replicas), ("gateway", snapshot.gateways))
        for entry in entries
        if entry.lateness
    ]
    for replica in snapshot.replicas:
        if replica.state == "starting":
            sentences.append(
                f"replica {replica.id} is starting {replica.reason} on {replica.node}; its log: {replica.log_path}"
            )
        elif replica.state == "draining":
            sentences.append(f"replica {replica.id} is draining: its streams move, then it stops")
        elif replica.state == "unhealthy":
            sentences.append(
                f"replica {replica.id} is unhealthy: {replica.reason or 'no reason given'}; it is replaced"
            )
        elif replica.reason:
            sentences.append(f"replica {replica.id}: {replica.reason}")
    if len(snapshot.gateways) < config.gateways:
        sentences.append(
            f"{config.gateways - len(snapshot.gateways)} of {config.gateways} gateways are missing; Serve starts them"
        )
    sentences += [
        f"gateway {g.id}: {g.reason}" if g.is_ready else f"gateway {g.id} is not ready: {g.reason}"
        for g in snapshot.gateways
        if g.reason
    ]
    nodes_used = {node for replica in snapshot.replicas for node in (replica.node, *replica.nodes)}
    nodes_used |= {gateway.node for gateway in snapshot.gateways}
    is_short = present < least or len(snapshot.gateways) < config.gateways
    if is_short or not nodes_used.isdisjoint(dead_nodes):
        sentences += [f"node {node} is dead; its replicas and gateways are started elsewhere" for node in dead_nodes]
    if present < least:
        sentences += [f"{f.who} failed: {f.message}" for f in snapshot.failures[-3:]]
    return sentences


def scaling_lines(scaling: Scaling, *, last: int = 20) -> list[str]:
    """What the autoscaling policy wants, on what numbers, and the `last` changes, the latest at the end."""
    targets = ", ".join(f"{pool} {target}" for pool, target in scaling.targets.items())
    lines = [f"autoscaling ({scaling.policy}): {targets}: {scaling.reason or 'nothing is decided yet'}"]
    if scaling.numbers:
        lines.append("  " + ", ".join(f"{name} {value:g}" for name, value in scaling.numbers.items()))
    return lines + [f"  {decided_line(decided)}" for decided in (scaling.history[-last:] if last else ())]


def decided_line(decided: Decided) -> str:
    """Like "12:01:33 on-demand 2 -> 3: 12 requests/s need it"."""
    changes = [
        f"{pool} {decided.before.get(pool, 0)} -> {target}"
        for pool, target in decided.targets.items()
        if decided.before.get(pool, 0) != target
    ]
    at = time.strftime("%X", time.localtime(decided.at_s))
    return f"{at} {', '.join(changes) or 'no change'}: {decided.reason}"


def notice_lines(snapshot: Snapshot, now_s: float) -> list[str]:
    """A line for each notice of a node, for each node that Ray drains without one, and for trouble with hearing any.

    `now_s`: Unix time.
    """
    lines = []
    for node in snapshot.nodes:
        lines += [f"node {node.node} {notice.describe(now_s)}" for notice in node.notices]
        if node.is_drained and not node.notices:
            lines.append(f"node {node.node} is drained: Ray puts nothing there any more")
        if node.problem:
            lines.append(f"node {node.node} may miss its notice: {node.problem}")
    return lines


def _missing(config: FleetConfig, present: int, least: int, nodes: Sequence[NodeDevices]) -> str:
    count = least - present
    what = f"{count}{' on-demand' if config.pools else ''} replica{'s' if count > 1 else ''}"
    if not placement.is_counted(config, nodes):
        return f"{what} of {least} not there yet: Ray is starting the process"
    demand = placement.demand(config, nodes)
    if placement.has_room(config, nodes):
        return f"{what} of {least} not there yet: Ray is placing, there is room for {demand}"
    free = ", ".join(f"node {node.node} has {node.free:g} free of {node.total}" for node in nodes)
    waits = f"{what} of {least} {'wait' if count > 1 else 'waits'} for {demand}"
    if config.adds_nodes:
        return f"{waits}: {free or 'no node has any'}; the cluster is to add a node (`ray status` says what it does)"
    smaller = f"--pool {ON_DEMAND}:{present}" if config.pools else present
    return f"{waits}: {free or 'no node has any'}; add a node, or kervan scale {smaller}"
