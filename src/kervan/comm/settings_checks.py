"""Variables and nccl.conf lines that hurt, or do nothing. NCCL's defaults are right on nearly every host.

Sources: NCCL's user guide, "Environment variables"; for sockets net_socket.cc; for NVLS nccl-tests issue 212: 8 H100
reach 370 GB/s by rings and 475 to 480 with it.
"""

from collections.abc import Iterable, Iterator

from kervan.comm.check import Advice, Check, failed, listed, passed, warned
from kervan.comm.facts import HostFacts, Setting
from kervan.comm.host_checks import active_ports, chosen, is_inside, usable

LEVELS = ("VERSION", "WARN", "INFO", "ABORT", "TRACE")
LOUD = ("INFO", "TRACE")
# A transport that is off, and what is used in its place.
TRANSPORTS = {
    "NCCL_P2P_DISABLE": "GPUs do not reach each other's memory, and data goes through the host's",
    "NCCL_SHM_DISABLE": "where GPUs have no peer access, data goes through network sockets",
    "NCCL_IB_DISABLE": "nodes talk over TCP",
}
PINNED = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NTHREADS", "NCCL_BUFFSIZE",
          "NCCL_P2P_LEVEL", "NCCL_NET_GDR_LEVEL", "NCCL_TOPO_FILE", "NCCL_GRAPH_FILE", "NCCL_CROSS_NIC")  # fmt: skip
MAX_SOCKET_THREADS, MAX_SOCKETS = 16, 64
MIN_HEARTBEAT_S = 60


def checks(facts: HostFacts, *, nodes: int) -> Iterator[Check]:
    """All of this page."""
    yield _transports(facts, nodes)
    yield _without_effect(facts)
    yield _debug(facts)
    yield _pinned(facts)
    yield _nvls(facts)
    yield _socket_threads(facts)
    yield _visible(facts)
    yield _timeouts(facts)
    yield _ras(facts)


def effective(facts: HostFacts, names: Iterable[str]) -> list[Setting]:
    """What counts of these variables, where they are set."""
    found = (facts.value(name) for name in names)
    return [setting for setting in found if setting is not None]


def _said(setting: Setting) -> str:
    return f"{setting.name}={setting.value} ({setting.source})"


def _remove(settings: Iterable[Setting]) -> str:
    names = [s.name if s.source == "environment" else f"the line {s.source}" for s in settings]
    return f"unset or remove {listed(dict.fromkeys(names))}"


def _transports(facts: HostFacts, nodes: int) -> Check:
    off = [s for s in effective(facts, TRANSPORTS) if s.value.strip() not in ("", "0")]
    if nodes == 1:
        off = [s for s in off if s.name != "NCCL_IB_DISABLE"]
    if off:
        return failed("transports-off", "; ".join(f"{_said(s)}: {TRANSPORTS[s.name]}" for s in off), _remove(off))
    return passed("transports-off", "no transport is turned off")


def _without_effect(facts: HostFacts) -> Check:
    idle = [s for s in effective(facts, TRANSPORTS) if s.value.strip() == "0"]
    counted = {setting.name: setting for setting in reversed(facts.settings)}
    shadowed = [s for s in facts.settings if counted[s.name] is not s]
    ib_only = [
        s for s in facts.settings if s.name.startswith("NCCL_IB_") and s.name not in TRANSPORTS and not facts.rdma
    ]
    said = [f"{_said(s)} is the default" for s in idle]
    said += [f"{_said(s)} is overruled by {_said(counted[s.name])}" for s in shadowed]
    said += [f"{_said(s)} is for RDMA cards, and there is none" for s in ib_only]
    if said:
        return warned("no-effect", listed(said, 4), _remove([*idle, *shadowed, *ib_only]))
    return passed("no-effect", "every setting has an effect")


def _debug(facts: HostFacts) -> Check:
    setting = facts.value("NCCL_DEBUG")
    if setting is None or not setting.value:
        return passed("debug", "NCCL prints nothing")
    level = setting.value.strip().upper()
    if level not in LEVELS:
        return warned(
            "debug", f"{_said(setting)} is no level, and is ignored; levels are {', '.join(LEVELS)}", "NCCL_DEBUG=WARN"
        )
    if level in LOUD:
        return warned(
            "debug", f"{_said(setting)} writes at each start and for each communicator", "NCCL_DEBUG=WARN in production"
        )
    return passed("debug", _said(setting))


def _pinned(facts: HostFacts) -> Check:
    pinned = effective(facts, PINNED)
    if pinned:
        return warned("tuning-pinned", f"{listed(map(_said, pinned))}: NCCL does not choose by size and topology",
                      f"{_remove(pinned)}, unless kervan comm bench is faster with it")  # fmt: skip
    return passed("tuning-pinned", "NCCL chooses algorithms, protocols and channels")


def _nvls(facts: HostFacts) -> Check:
    setting = facts.value("NCCL_NVLS_ENABLE")
    if setting is not None and setting.value.strip() == "0":
        if len(facts.gpus) < 2:
            return passed("nvls", f"{_said(setting)}, which one GPU does not need")
        return warned(
            "nvls", f"{_said(setting)}: large all-reduces on an NVSwitch reach about 0.8 of what they could",
            "leave it if the host's owner turned it off: multicast may not be allowed there; else unset it",
        )  # fmt: skip
    return passed("nvls", "NCCL may use NVLink multicast where the host has it")


def _socket_threads(facts: HostFacts) -> Check:
    pair = effective(facts, ("NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD"))
    if not pair:
        return passed("socket-threads", "NCCL's defaults")
    values = {s.name: int(s.value) if s.value.strip().isdecimal() else 0 for s in pair}
    threads, sockets = values.get("NCCL_SOCKET_NTHREADS", 1), values.get("NCCL_NSOCKS_PERTHREAD", 1)
    said = listed(map(_said, pair))
    if threads > MAX_SOCKET_THREADS or threads * sockets > MAX_SOCKETS:
        return warned(
            "socket-threads",
            f"{said}: {threads} x {sockets} = {threads * sockets} above {MAX_SOCKETS}, or {MAX_SOCKET_THREADS} threads",
            _remove(pair),
        )
    if active_ports(facts):
        return warned("socket-threads", f"{said}: for TCP only, and this host has RDMA", _remove(pair))
    return passed("socket-threads", said)


def _visible(facts: HostFacts) -> Check:
    setting = facts.value("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return passed("visible-devices", "all GPUs are visible")
    words = [word.strip() for word in setting.value.split(",") if word.strip()]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        return failed("visible-devices", f"{_said(setting)} names {listed(twice)} twice, which NCCL refuses",
                      "name each GPU once")  # fmt: skip
    missing = [word for word in words if word.isdecimal() and facts.gpus and int(word) >= len(facts.gpus)]
    if missing:
        return failed("visible-devices", f"{_said(setting)} names {listed(missing)}: there are {len(facts.gpus)}",
                      f"name GPUs from 0 to {len(facts.gpus) - 1}")  # fmt: skip
    if not words and facts.gpus:
        return failed("visible-devices", f"{_said(setting)} hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    return passed("visible-devices", _said(setting))


def _timeouts(facts: HostFacts) -> Check:
    off = [
        s
        for s in effective(
            facts, ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
        )
        if s.value.strip() == "0"
    ]
    if off:
        return warned(
            "timeouts",
            f"{listed(map(_said, off))}: a collective that hangs is not ended, and its GPUs stay busy",
            _remove(off),
        )
    beat = facts.value("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    if beat is not None and beat.value.strip().isdecimal() and 0 < int(beat.value) < MIN_HEARTBEAT_S:
        return warned("timeouts", f"{_said(beat)} is shorter than a slow start: torch ends a healthy process",
                      f"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={MIN_HEARTBEAT_S} or more (default 480)")  # fmt: skip
    return passed("timeouts", "torch ends a collective that hangs")


def _ras(facts: HostFacts) -> Check:
    setting = facts.value("NCCL_RAS_ENABLE")
    if setting is not None and setting.value.strip() == "0":
        return warned(
            "ras-on", f"{_said(setting)}: in a hang nobody can ask NCCL which rank is behind", _remove([setting])
        )
    return passed("ras-on", "NCCL 2.24 and newer can be asked which rank is behind (ncclras)")


def advice(facts: HostFacts, *, nodes: int) -> list[Advice]:
    """The environment for this host, a reason for each line. NVLink multicast is left as it is."""
    found = []
    hurting = [s for s in effective(facts, TRANSPORTS) if s.value.strip() not in ("", "0")]
    found += [Advice(s.name, "", TRANSPORTS[s.name]) for s in hurting if nodes > 1 or s.name != "NCCL_IB_DISABLE"]
    found += [Advice(s.name, "", "is the default") for s in effective(facts, TRANSPORTS) if s.value.strip() == "0"]
    found += [Advice(s.name, "", "NCCL chooses by size and topology") for s in effective(facts, PINNED)]
    setting = facts.value("NCCL_DEBUG")
    if setting is None or setting.value.strip().upper() != "WARN":
        found.append(Advice("NCCL_DEBUG", "WARN", "errors with their reason, and nothing else"))
    taken = chosen(facts)
    good = [i for i in usable(facts) if not is_inside(i)]
    first = next((i for i in good if i.has_default_route), good[0] if good else None)
    pinned = facts.value("NCCL_SOCKET_IFNAME")
    is_bad = bool(taken) and (is_inside(taken[0]) or (pinned is not None and any(map(is_inside, taken))))
    if first is not None and (is_bad or (pinned is not None and not taken)):
        found.append(Advice("NCCL_SOCKET_IFNAME", f"={first.name}", "exactly this one leads to other hosts"))
        found.append(Advice("GLOO_SOCKET_IFNAME", first.name, "the same for gloo, which takes exact names"))
    if pinned is None and nodes > 1 and len(good) > 1 and first is not None and not is_bad:
        found.append(
            Advice("NCCL_SOCKET_IFNAME", f"={first.name}", "the same on all nodes: they have several, and may differ")
        )
    if facts.value("NCCL_IB_HCA") is not None:
        found.append(Advice("NCCL_IB_HCA", "", "NCCL takes the card nearest to each GPU, and all rails"))
    if facts.gpus:
        found.append(Advice("TORCH_FR_BUFFER_SIZE", "2000", "torch remembers the last collectives of each rank"))
        found.append(Advice("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and writes them down when one hangs"))
    seen: dict[tuple[str, str], Advice] = {(a.name, a.value): a for a in reversed(found)}
    return [a for a in found if seen.get((a.name, a.value)) is a]
