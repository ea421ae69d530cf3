"""docs/metrics.md and the alerts of docs/monitoring.md are made from the code.

`python tests/docs/test_metrics_page.py` writes them.
"""

import re

import pytest
from harness.places import DOCS
from harness.toy_fleet import ToyCodec
from prometheus_client.parser import text_string_to_metric_families

from kervan import metrics
from kervan.config.api_keys import table_of
from kervan.config.workload import Slo
from kervan.fleet.auth import Secrets
from kervan.fleet.client import FleetClient
from kervan.fleet.directory import GatewayEntry, NodeEntry, ReplicaEntry, Scaling, Snapshot
from kervan.fleet.events import Counted, EventCounts
from kervan.fleet.reconnect.replicated_store import ReplicatedStore
from kervan.gateway import server
from kervan.observe.render import rules

PAGE = DOCS / "metrics.md"
MONITORING, ALERTS_MARK = DOCS / "monitoring.md", "<!-- alerts -->\n"
SHARED = {"fleet", "model_name"}


def table(section: str) -> str:
    lines = ["| metric | type | labels | counted by | meaning |", "|---|---|---|---|---|"]
    for metric in metrics.SECTIONS[section]:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        meaning = f"{metric.condition}: {metric.help}" if metric.condition else metric.help
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.scope} | {meaning} |")
    return "\n".join(lines) + "\n"


def section_of(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"(?<=^## {re.escape(name)}\n\n)(?:\|[^\n]*\n)+", text, re.M)
    assert found is not None, f"docs/metrics.md has no section {name!r} that begins with a table"
    return found


@pytest.mark.parametrize("name", metrics.SECTIONS)
def test_the_page_has_the_metrics_of_the_code(name: str) -> None:
    found = section_of(PAGE.read_text(), name)[0]
    assert found == table(name), "python tests/docs/test_metrics_page.py writes the tables"


def test_names_say_what_is_counted_in_base_units() -> None:
    for metric in metrics.ALL.values():
        assert re.fullmatch(r"kervan_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert not re.search(r"_(ms|millis|milliseconds|mib|percent|kb)(_|$)", metric.name)
        assert metric.help.endswith(".")
        assert metric.help.isascii()
        assert not {"gateway"} & set(metric.labels) or metric.scope == "fleet"
    assert sum(map(len, metrics.SECTIONS.values())) == len(metrics.ALL)


async def test_a_gateway_exports_each_metric_as_it_is_described() -> None:
    """Names, kinds, labels and help texts of all that a page has from kervan are those of the code, and none lacks."""
    config = server.GatewayConfig(
        gateway_id="gw-1", node="n", engine_argv=(), secret="s", host="h", port=1, internal_host="h", public_host="h",
        max_queued_streams=1, hold_timeout_s=1.0, stop_timeout_s=1.0, opens_when_attached=False,
        is_twin=True, shared_port=False, fleet_name="f", models=(), replay_s=1.0, replay_max_bytes=1,
    )  # fmt: skip
    gateway = server.Gateway(config)
    gateway.keys.update(table_of(("k",), None))
    gateway.keys.refuse(None, "key")
    gateway.fleet = FleetClient(ToyCodec(), secret="s")
    gateway.streams.store = ReplicatedStore(
        gateway_id="gw-1", node="n", secrets=Secrets("s"), engine_version="", replay_s=1.0, max_bytes=1
    )
    tally = gateway.fleet._meter.tally("r")
    tally.ttft.observe(0.1)
    tally.tpot.observe(0.01)
    counted = Counted([1] + [0] * 11, 0.5)
    gateway._snapshot = Snapshot(
        1, [ReplicaEntry("r", "spot", "n", 1, "ready", "a:1")], [GatewayEntry("gw-1", "n", 2, "", "", True)], [],
        [NodeEntry("n")], targets={"spot": 1}, slo=Slo(ttft_s=2.0), bounds={"spot": (1, 2)}, usd_per_h={"spot": 3.5},
        scaling=Scaling("slo", {"spot": 1}, "why", {"load": 1.0}, room={"spot": 2}, changes={"spot": {"up": 1}}),
        events=EventCounts({"spot": 1}, {"spot": counted}, 0, {"spot": 0}, {"preemption": {"aws": 1}},
                           Counted([0] * 13, 0.0)),
    )  # fmt: skip
    page = gateway._local_page()
    await gateway.streams.store.close()
    await gateway.fleet.close()
    found = {}
    for family in text_string_to_metric_families(page):
        if family.name.startswith("kervan_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels >= SHARED or not family.samples
            found[name] = family.type, family.documentation, labels - SHARED
    # Of links to replicas, and there are none here; tests/integration/test_prometheus.py has some.
    found[metrics.STALLED.name] = (*found[metrics.STALLED.name][:2], {"replica", "pool"})
    assert found == {m.name: (m.kind, m.help, set(m.labels)) for m in metrics.ALL.values()}


def alerts() -> str:
    return "\n".join(
        f"### {alert.name}\n\n{alert.severity}. {alert.meaning}\n\n- Threshold: {alert.threshold}\n- Do: {alert.action}\n"
        for alert in rules.alerts()
    )


def test_the_page_has_the_alerts_of_the_code() -> None:
    found = MONITORING.read_text().partition(ALERTS_MARK)[2]
    assert found == alerts(), "python tests/docs/test_metrics_page.py writes them"


if __name__ == "__main__":
    before, mark, _ = MONITORING.read_text().partition(ALERTS_MARK)
    MONITORING.write_text(before + mark + alerts())
    text = PAGE.read_text()
    for name in metrics.SECTIONS:
        match = section_of(text, name)
        text = text[: match.start()] + table(name) + text[match.end() :]
    PAGE.write_text(text)
