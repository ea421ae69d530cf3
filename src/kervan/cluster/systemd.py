"""A fleet as services of systemd: on one machine with a Ray of its own, or on several that form a cluster."""

from collections.abc import Sequence

from kervan.cluster import one_machine
from kervan.cluster.fleet_file import for_cluster, settings
from kervan.cluster.request import RenderRequest
from kervan.cluster.text import as_yaml, made_by

BIN = "/opt/kervan/bin"
STATE = "/var/lib/kervan"
HEAD_UNIT = "kervan-ray-head.service"
PORT = 6379

Section = tuple[str, Sequence[tuple[str, str]]]


def files(request: RenderRequest) -> dict[str, str]:
    """Units by their names, and the fleet's file for /etc/kervan."""
    is_alone = request.most_nodes <= 1 or not request.machine.gpus
    fleet = request.fleet
    if not is_alone:
        fleet = for_cluster(fleet, gpus_per_node=request.machine.gpus, nodes=request.most_nodes)
    made = {f"kervan-{request.name}.service": _fleet(request, is_alone=is_alone)}
    if not is_alone:
        made[HEAD_UNIT] = _head(request)
        for group in request.groups:
            made[f"kervan-ray-{group.market}.service"] = _worker(request, group.market)
    units = {name: unit(request, sections) for name, sections in made.items()}
    return {**units, f"{request.name}.yaml": as_yaml(request.target, settings(fleet))}


def unit(request: RenderRequest, sections: Sequence[Section]) -> str:
    """The text of a unit."""
    parts = [f"[{title}]\n" + "".join(f"{key}={value}\n" for key, value in entries) for title, entries in sections]
    return made_by(request.target) + "\n".join(parts)


def _fleet(request: RenderRequest, *, is_alone: bool) -> list[Section]:
    up = f"{BIN}/kervan up --config /etc/kervan/{request.name}.yaml --name {request.name}"
    environment_file = f"/etc/kervan/{request.name}.env"
    needs = [] if is_alone else [("Requires", HEAD_UNIT), ("After", HEAD_UNIT)]
    joins = [] if is_alone else [("EnvironmentFile", "/etc/kervan/ray.env")]
    return [
        (
            "Unit",
            [
                ("Description", f"kervan fleet {request.name}"),
                ("Wants", "network-online.target"),
                ("After", "network-online.target"),
                *needs,
                # It starts again until the machines that it needs are there.
                ("StartLimitIntervalSec", "0"),
            ],
        ),
        (
            "Service",
            [
                ("Type", "exec"),
                ("ExecStart", up if is_alone else f"{up} --address auto"),
                # SIGTERM is Ctrl-C to kervan up: it ends the fleet, then what is left is killed.
                ("KillMode", "mixed"),
                ("TimeoutStopSec", str(one_machine.stop_s(request))),
                # KERVAN_API_KEY and HF_TOKEN: readable by root alone.
                ("EnvironmentFile", environment_file),
                *joins,
                *_common(),
            ],
        ),
        ("Install", [("WantedBy", "multi-user.target")]),
    ]


def _head(request: RenderRequest) -> list[Section]:
    start = (
        f"{BIN}/ray start --head --block --port={PORT} --num-cpus=0 --num-gpus=0 --temp-dir={STATE}/ray "
        "--dashboard-host=127.0.0.1"
    )
    return _ray(request, "kervan: head of the Ray cluster", start, "on-demand")


def _worker(request: RenderRequest, market: str) -> list[Section]:
    # KERVAN_RAY_HEAD, of ray.env, is HOST:PORT. Labels cannot be changed while Ray runs on a node.
    start = (
        f"{BIN}/ray start --block --address=${{KERVAN_RAY_HEAD}} --num-gpus={request.machine.gpus} "
        f"--labels=ray.io/market-type={market}"
    )
    return _ray(request, f"kervan: {market} node of the Ray cluster", start, market)


def _ray(request: RenderRequest, description: str, start: str, market: str) -> list[Section]:
    grace = request.grace(market)
    return [
        (
            "Unit",
            [
                ("Description", description),
                ("Wants", "network-online.target"),
                ("After", "network-online.target"),
                ("StartLimitIntervalSec", "0"),
            ],
        ),
        (
            "Service",
            [
                ("Type", "exec"),
                ("ExecStart", start),
                # Ray drains its node at SIGTERM; kervan's watcher sees that, and the streams move.
                ("Environment", f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={grace.drain_s}"),
                ("Environment", "KERVAN_NOTICES_WATCH=auto,signal"),
                ("Environment", f"KERVAN_NOTICES_SIGTERM_LEAD_S={grace.drain_s}"),
                ("KillMode", "mixed"),
                ("TimeoutStopSec", str(grace.period_s)),
                # RAY_AUTH_MODE, RAY_AUTH_TOKEN and KERVAN_RAY_HEAD.
                ("EnvironmentFile", "/etc/kervan/ray.env"),
                *_common(),
            ],
        ),
        ("Install", [("WantedBy", "multi-user.target")]),
    ]


def _common() -> list[tuple[str, str]]:
    """A user without rights beyond its own directory."""
    return [
        ("User", "kervan"),
        ("Group", "kervan"),
        ("StateDirectory", "kervan"),
        ("Environment", f"HOME={STATE}"),
        ("Environment", f"PATH={BIN}:/usr/local/bin:/usr/bin:/bin"),
        ("Environment", "RAY_USAGE_STATS_ENABLED=0"),
        ("Restart", "on-failure"),
        ("RestartSec", "15"),
        ("LimitNOFILE", "65536"),
        ("LimitMEMLOCK", "infinity"),
        ("TasksMax", "infinity"),
        ("NoNewPrivileges", "yes"),
        ("PrivateTmp", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
    ]
