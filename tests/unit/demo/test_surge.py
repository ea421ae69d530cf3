"""What `kervan demo autoscale` serves, sends and shows."""

from pathlib import Path
from typing import Any

from kervan.bench.arrivals import parse_stages
from kervan.config.fleet import from_mapping, load_file
from kervan.demo import surge
from kervan.twin import capacity, settings


def test_the_surge_needs_more_than_one_replica_and_fewer_than_there_may_be(tmp_path: Path) -> None:
    model, path = surge.write(tmp_path)
    config = from_mapping({"model": str(model), **load_file(path)}, str(path))
    one = capacity.capacity(settings.settings(config))
    highest = max(stage.end_rate for stage in parse_stages(surge.STAGES))
    lengths = {"prompt_tokens": surge.PROMPT_TOKENS, "output_tokens": surge.OUTPUT_TOKENS}
    assert one.predict(requests_per_s=highest, **lengths).utilization > 1
    assert one.predict(requests_per_s=highest / surge.MOST, **lengths).utilization < 1
    assert config.autoscaler is not None
    assert config.autoscaler.policy == "slo"


def test_the_view_shows_load_replicas_and_reasons() -> None:
    states = ["ready", "ready", "starting", "draining"]
    entry = {"at_s": 5.0, "before": {"on-demand": 2}, "targets": {"on-demand": 3}, "reason": "3 are needed"}
    scaling = {"targets": {"on-demand": 3}, "numbers": {"load_requests_per_s": 7.25}, "history": [entry]}
    status: dict[str, Any] = {
        "streams": 14,
        "held": 2,
        "directory": {"replicas": [{"state": state} for state in states], "scaling": scaling},
    }
    assert surge.line(status) == "  7.2 requests/s   14 streams,   2 held  [##+-  ] 2 ready, 3 wanted"
    assert surge.changes(status) == [(5.0, "2 -> 3: 3 are needed")]
    status["directory"] |= {"scaling": None, "replicas": []}
    assert "0 ready, 0 wanted" in surge.line(status)
    assert surge.changes(status) == []
