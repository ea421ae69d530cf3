"""The columns of each table of `kervan top`, and the orders that rows can have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from kervan.cli.live.history import History, Series, traffic
from kervan.cli.live.spark import meter, spark
from kervan.cli.live.table import Column, printable
from kervan.cli.render import gateway_state_text, state_text
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot
from kervan.observe.dcgm import DEV, PROF, GpuCounters
from kervan.units import format_duration

WARM, HOT = 0.7, 0.9  # of a share: yellow and red from there


@dataclass(frozen=True, slots=True)
class GpuRow:
    """A GPU of a node."""

    node: str
    gpu: GpuCounters

    @property
    def id(self) -> str:
        """What tells it from others while it moves in the table."""
        return f"{self.node}/{self.gpu.uuid or self.gpu.index}"


@dataclass(frozen=True, slots=True)
class Order:
    """An order of rows; numbers have the largest first."""

    title: str
    key: Callable[[Any], Any]
    is_descending: bool = True


def plain(text: Text) -> Text:
    """The same text, as it may go to a terminal."""
    clean = printable(text.plain)
    return text if clean == text.plain else Text(clean, text.style)


def share_text(share: float, *, width: int = 0, is_unicode: bool) -> Text:
    """A percentage with its colour, and a bar of `width`."""
    style = "red" if share >= HOT else "yellow" if share >= WARM else "green"
    bar = f"{meter(share, width, is_unicode=is_unicode)} " if width else ""
    return Text.assemble((bar, style), (f"{share:.0%}", "" if share < WARM else style))


def duration(seconds: float | None) -> str:
    """Like "30 ms"; "-" for None."""
    return "-" if seconds is None else format_duration(seconds)


def replica_columns(
    snapshot: Snapshot, history: History, width: int, *, is_unicode: bool
) -> list[Column[ReplicaEntry]]:
    """Of the table of replicas."""
    rates = {r.id: traffic(snapshot, r.id) for r in snapshot.replicas}
    none = Series()
    length = 24 if width >= 150 else 12
    bar = 8 if width >= 110 else 0

    def seen(r: ReplicaEntry) -> Series:
        return history.parts.get(r.id, none)

    def served(r: ReplicaEntry) -> int:
        return sum(g.traffic[r.id].num_served for g in snapshot.gateways if r.id in g.traffic)

    def moved(r: ReplicaEntry) -> int:
        return sum(g.traffic[r.id].num_moved for g in snapshot.gateways if r.id in g.traffic)

    highest = max((value or 0 for series in history.parts.values() for value in series.tokens_per_s), default=0.0)
    return [
        Column("replica", lambda r: r.id, 0, is_right=False, least=8),
        Column("state", lambda r: plain(state_text(r.state, r.reason, r.lateness)), 0, is_right=False, grows=True,
               least=9),
        Column("run", lambda r: str(r.running), 2),
        Column("wait", lambda r: str(r.waiting), 3),
        Column("KV", lambda r: share_text(r.kv_cache_usage, width=bar, is_unicode=is_unicode), 3),
        Column("tok/s", lambda r: f"{rates[r.id].tokens_per_s:,.0f}", 1),
        Column("TTFT", lambda r: duration(rates[r.id].ttft_s), 4),
        Column("tok/s so far", lambda r: Text(
            spark(seen(r).tokens_per_s, length, is_unicode=is_unicode, top=highest), "cyan"), 6),
        Column("pool", lambda r: r.pool, 7, is_right=False),
        Column("node", lambda r: r.node + (f" +{len(r.nodes) - 1}" if len(r.nodes) > 1 else ""), 5, is_right=False),
        Column("served", lambda r: f"{served(r):,}", 8),
        Column("moved off", lambda r: f"{moved(r):,}", 9),
        Column("ready for", lambda r: duration(r.ready_for_s or None), 10),
        Column("pid", lambda r: str(r.pid), 11),
    ]  # fmt: skip


def replica_orders(snapshot: Snapshot) -> list[Order]:
    """What replicas can be sorted by, the usual one first."""
    return [
        Order("replica", lambda r: r.id, is_descending=False),
        Order("tok/s", lambda r: traffic(snapshot, r.id).tokens_per_s),
        Order("run", lambda r: r.running),
        Order("wait", lambda r: r.waiting),
        Order("KV", lambda r: r.kv_cache_usage),
        Order("TTFT", lambda r: traffic(snapshot, r.id).ttft_s or 0.0),
        Order("node", lambda r: (r.node, r.id), is_descending=False),
    ]


def gateway_rate(gateway: GatewayEntry) -> float:
    """Tokens per second through a gateway."""
    return sum(share.tokens_per_s for share in gateway.traffic.values())


def gateway_columns(history: History, width: int, *, is_unicode: bool) -> list[Column[GatewayEntry]]:
    """Of the table of gateways."""
    none = Series()
    length = 24 if width >= 150 else 12
    bar = 8 if width >= 100 else 0
    return [
        Column("gateway", lambda g: g.id, 0, is_right=False, least=8),
        Column("state", lambda g: plain(gateway_state_text(g)), 0, is_right=False, grows=True, least=9),
        Column("streams", lambda g: str(g.streams), 1),
        Column("held", lambda g: str(g.held), 3),
        Column("moved", lambda g: f"{g.moved:,}", 4),
        Column("busy", lambda g: share_text(g.busy, width=bar, is_unicode=is_unicode), 2),
        Column("tok/s", lambda g: f"{gateway_rate(g):,.0f}", 2),
        Column("tok/s so far", lambda g: Text(
            spark(history.parts.get(g.id, none).tokens_per_s, length, is_unicode=is_unicode), "cyan"), 6),
        Column("node", lambda g: g.node, 5, is_right=False),
        Column("pid", lambda g: str(g.pid), 7),
    ]  # fmt: skip


GATEWAY_ORDERS = [
    Order("gateway", lambda g: g.id, is_descending=False),
    Order("tok/s", gateway_rate),
    Order("streams", lambda g: g.streams),
    Order("held", lambda g: g.held),
    Order("moved", lambda g: g.moved),
    Order("busy", lambda g: g.busy),
]


def _value(row: GpuRow, name: str) -> float:
    return row.gpu.values.get(name, -1.0)


def _number(name: str, unit: str = "", factor: float = 1.0) -> Callable[[GpuRow], str]:
    def cell(row: GpuRow) -> str:
        value = row.gpu.values.get(name)
        return "-" if value is None else f"{value * factor:,.0f}{unit}"

    return cell


def _share(name: str, factor: float, bar: int, *, is_unicode: bool) -> Callable[[GpuRow], Text | str]:
    def cell(row: GpuRow) -> Text | str:
        value = row.gpu.values.get(name)
        if value is None:
            return "-"
        shown = meter(value * factor, bar, is_unicode=is_unicode) + " " if bar else ""
        return Text.assemble((shown, "green"), f"{value * factor:.0%}")

    return cell


def _memory(bar: int, *, is_unicode: bool) -> Callable[[GpuRow], Text | str]:
    def cell(row: GpuRow) -> Text | str:
        used, free = row.gpu.values.get(f"{DEV}FB_USED"), row.gpu.values.get(f"{DEV}FB_FREE")
        if used is None:
            return "-"
        if free is None:
            return f"{used / 1024:.0f} GiB"
        shown = meter(used / max(1.0, used + free), bar, is_unicode=is_unicode) + " " if bar else ""
        return Text.assemble((shown, "blue"), f"{used / 1024:.0f}/{(used + free) / 1024:.0f} GiB")

    return cell


def _bytes(sent: str, received: str) -> Callable[[GpuRow], str]:
    def cell(row: GpuRow) -> str:
        pair = [row.gpu.values.get(name) for name in (sent, received)]
        return "/".join("-" if value is None else f"{value / 1e9:.1f}" for value in pair)

    return cell


def _faults(row: GpuRow) -> Text:
    """The last Xid and uncorrected errors, where there are any."""
    told = []
    if xid := row.gpu.values.get(f"{DEV}XID_ERRORS"):
        told.append(f"Xid {xid:.0f}")
    if wrong := row.gpu.values.get(f"{DEV}ECC_DBE_VOL_TOTAL"):
        told.append(f"ECC {wrong:.0f}")
    return Text(", ".join(told) or "-", "red" if told else "")


def gpu_columns(width: int, *, is_unicode: bool) -> list[Column[GpuRow]]:
    """Of the table of GPUs; docs/gpus.md says what each number means."""
    bar = 8 if width >= 130 else 0
    return [
        Column("node", lambda row: row.node, 0, is_right=False, least=9),
        Column("GPU", lambda row: str(row.gpu.index), 0),
        Column("name", lambda row: row.gpu.name, 9, is_right=False),
        Column("util", _share(f"{DEV}GPU_UTIL", 0.01, 0, is_unicode=is_unicode), 1),
        Column("SM", _share(f"{PROF}SM_ACTIVE", 1.0, bar, is_unicode=is_unicode), 2),
        Column("tensor", _share(f"{PROF}PIPE_TENSOR_ACTIVE", 1.0, 0, is_unicode=is_unicode), 4),
        Column("DRAM", _share(f"{PROF}DRAM_ACTIVE", 1.0, 0, is_unicode=is_unicode), 3),
        Column("memory", _memory(bar, is_unicode=is_unicode), 1),
        Column("power", _number(f"{DEV}POWER_USAGE", " W"), 3),
        Column("temp", _number(f"{DEV}GPU_TEMP", " C"), 3),
        Column("SM clock", _number(f"{DEV}SM_CLOCK", " MHz"), 6),
        Column("NVLink tx/rx GB/s", _bytes(f"{PROF}NVLINK_TX_BYTES", f"{PROF}NVLINK_RX_BYTES"), 7),
        Column("PCIe tx/rx GB/s", _bytes(f"{PROF}PCIE_TX_BYTES", f"{PROF}PCIE_RX_BYTES"), 8),
        Column("faults", _faults, 4, is_right=False),
        Column("held down by", lambda row: "-" if row.gpu.throttle is None else ", ".join(row.gpu.throttle), 5,
               is_right=False, grows=True, least=12),
    ]  # fmt: skip


GPU_ORDERS = [
    Order("node", lambda row: (row.node, row.gpu.index), is_descending=False),
    Order("util", lambda row: _value(row, f"{DEV}GPU_UTIL")),
    Order("SM", lambda row: _value(row, f"{PROF}SM_ACTIVE")),
    Order("memory", lambda row: _value(row, f"{DEV}FB_USED")),
    Order("power", lambda row: _value(row, f"{DEV}POWER_USAGE")),
    Order("temp", lambda row: _value(row, f"{DEV}GPU_TEMP")),
]
