"""Writes everything that Prometheus and Grafana read into one directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kervan.errors import ConfigError
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
) -> list[Path]:
    """`prometheus.yml`, rules, dashboards and Grafana's provisioning; the files written.

    Raises: ConfigError when one cannot be written.
    """
    files: dict[str, Any] = {
        "prometheus.yml": scrape.prometheus(targets, fleet=fleet, dcgm=dcgm, has_ray=has_ray, tls=tls),
        "rules/kervan.yml": rules.to_dict(objective),
        "grafana/provisioning/datasources/kervan.yml": _data_source(),
        "grafana/provisioning/dashboards/kervan.yml": _provider(directory),
        **{f"grafana/dashboards/{board.uid}.json": to_json(board) for board in DASHBOARDS},
    }
    return [_write(directory / name, content) for name, content in files.items()]


def for_kubernetes(
    directory: Path, *, namespace: str, labels: Mapping[str, str], objective: float, tls: ScrapeTls | None = None
) -> list[Path]:
    """Manifests for the Prometheus Operator and Grafana's sidecar; the files written. Raises: as above."""
    return [
        _write(directory / "monitors.yaml", scrape.operator_monitors(namespace, labels, tls=tls)),
        _write(directory / "rules.yaml", [scrape.operator_rules(namespace, labels, objective)]),
        _write(directory / "dashboards.yaml", scrape.dashboard_maps(namespace)),
    ]


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


def _write(path: Path, content: Any) -> Path:
    documents = content if isinstance(content, list) else [content]
    if path.suffix == ".json":
        text = json.dumps(content, indent=1) + "\n"
    else:
        text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100_000)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; give another directory") from error
    return path
