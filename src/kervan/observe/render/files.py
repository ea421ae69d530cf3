"""Everything that Prometheus and Grafana read, as the files of one directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kervan.observe.render import rules, scrape
from kervan.observe.render.dashboards import DASHBOARDS, to_json
from kervan.observe.render.scrape import ScrapeTls


def for_prometheus(
    directory: Path,
    targets: Sequence[str],
    *,
    fleet: str,
    dcgm: Sequence[str],
    has_ray: bool,
    objective: float,
    tls: ScrapeTls | None = None,
) -> dict[str, str]:
    """`prometheus.yml`, rules, dashboards and Grafana's provisioning: texts by name.

    `directory`: where they will be; Grafana is told so.
    """
    files: dict[str, Any] = {
        "prometheus.yml": scrape.prometheus(targets, fleet=fleet, dcgm=dcgm, has_ray=has_ray, tls=tls),
        "rules/kervan.yml": rules.to_dict(objective),
        "grafana/provisioning/datasources/kervan.yml": _data_source(),
        "grafana/provisioning/dashboards/kervan.yml": _provider(directory),
        **{f"grafana/dashboards/{board.uid}.json": to_json(board) for board in DASHBOARDS},
    }
    return {name: _as_text(name, content) for name, content in files.items()}


def for_kubernetes(
    *, namespace: str, labels: Mapping[str, str], objective: float, tls: ScrapeTls | None = None
) -> dict[str, str]:
    """Manifests for the Prometheus Operator and Grafana's sidecar: texts by name."""
    files = {
        "monitors.yaml": scrape.operator_monitors(namespace, labels, tls=tls),
        "rules.yaml": [scrape.operator_rules(namespace, labels, objective)],
        "dashboards.yaml": scrape.dashboard_maps(namespace),
    }
    return {name: _as_text(name, content) for name, content in files.items()}


def _data_source() -> dict[str, Any]:
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": "http://127.0.0.1:9090"}
    return {"apiVersion": 1, "datasources": [{**source, "isDefault": True}]}


def _provider(directory: Path) -> dict[str, Any]:
    folder = {"path": str((directory / "grafana/dashboards").resolve())}
    return {"apiVersion": 1, "providers": [{"name": "kervan", "folder": "kervan", "type": "file", "options": folder}]}


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, and lists below their key as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _as_text(name: str, content: Any) -> str:
    if name.endswith(".json"):
        return json.dumps(content, indent=1) + "\n"
    documents = content if isinstance(content, list) else [content]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100_000)
