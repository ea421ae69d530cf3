import json
from pathlib import Path

import yaml

from kervan.cli import outputs
from kervan.observe.render import files, rules, scrape
from kervan.observe.render.dashboards import DASHBOARDS


def test_every_node_is_asked_for_its_own_gateways() -> None:
    jobs = scrape.prometheus(["a:8000", "b:8000"], fleet="chat", dcgm=["a:9400"], has_ray=True)["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["kervan", "ray", "dcgm"]
    assert jobs[0]["metrics_path"] == "/metrics/node"
    assert jobs[0]["static_configs"] == [{"targets": ["a:8000", "b:8000"]}]
    assert jobs[0]["params"] == {"fleet": ["chat"]}
    assert jobs[1]["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    (alone,) = scrape.prometheus(["a:8000"])["scrape_configs"]
    assert "params" not in alone


def test_gateways_with_tls_are_asked_by_https() -> None:
    (job,) = scrape.prometheus(["a:8000"], tls=scrape.ScrapeTls("/ca.pem", "chat.example"))["scrape_configs"]
    assert job["scheme"] == "https"
    assert job["tls_config"] == {"ca_file": "/ca.pem", "server_name": "chat.example"}
    (job,) = scrape.prometheus(["a:8000"], tls=scrape.ScrapeTls())["scrape_configs"]
    assert (job["scheme"], job["tls_config"]) == ("https", {})
    (monitor, *_) = scrape.operator_monitors("llm", {}, tls=scrape.ScrapeTls(server_name="chat.example"))
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]) == ("https", {"serverName": "chat.example"})


def test_grafana_finds_the_dashboards_where_they_are(tmp_path: Path) -> None:
    texts = files.for_prometheus(tmp_path / "m", ["a:1"], fleet="", dcgm=[], has_ray=False, objective=0.99)
    outputs.write_files("DIR", tmp_path / "m", texts)
    provider = yaml.safe_load((tmp_path / "m/grafana/provisioning/dashboards/kervan.yml").read_text())
    folder = Path(provider["providers"][0]["options"]["path"])
    assert {json.loads(path.read_text())["uid"] for path in folder.iterdir()} == {board.uid for board in DASHBOARDS}
    source = yaml.safe_load((tmp_path / "m/grafana/provisioning/datasources/kervan.yml").read_text())
    assert source["datasources"][0]["isDefault"]


def test_kubernetes_gets_the_same_rules_and_dashboards_as_objects() -> None:
    texts = files.for_kubernetes(namespace="llm", labels={"release": "prometheus"}, objective=0.95)
    objects = [one for text in texts.values() for one in yaml.safe_load_all(text)]
    kinds = [one["kind"] for one in objects]
    assert sorted(set(kinds)) == ["ConfigMap", "PodMonitor", "PrometheusRule", "ServiceMonitor"]
    assert {one["metadata"]["namespace"] for one in objects} == {"llm"}
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    (rule,) = [one for one in objects if one["kind"] == "PrometheusRule"]
    assert rule["spec"] == rules.to_dict(0.95)
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    (gateways,) = [one for one in objects if one["metadata"]["name"] == "kervan-gateways"]
    assert gateways["spec"]["podMetricsEndpoints"][0]["path"] == "/metrics/node"
    boards = [json.loads(text) for one in objects if one["kind"] == "ConfigMap" for text in one["data"].values()]
    assert {board["uid"] for board in boards} == {board.uid for board in DASHBOARDS}
