"""Makes kubernetes.json and compose.json: `python minify.py DIR`, where DIR has kubernetes_validate and check_jsonschema.

pip install --no-deps --target DIR kubernetes-validate==1.37.0 check-jsonschema==0.39.0
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
COMPOSE = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
KINDS = {
    "ConfigMap": "core.v1.ConfigMap",
    "DaemonSet": "apps.v1.DaemonSet",
    "Deployment": "apps.v1.Deployment",
    "Job": "batch.v1.Job",
    "NetworkPolicy": "networking.v1.NetworkPolicy",
    "PodDisruptionBudget": "policy.v1.PodDisruptionBudget",
    "PodTemplateSpec": "core.v1.PodTemplateSpec",
    "Service": "core.v1.Service",
}


def bare(value: Any) -> Any:
    """Without what checks nothing."""
    if isinstance(value, list):
        return [bare(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: bare(item)
        for key, item in value.items()
        if not (key == "description" and isinstance(item, str)) and not key.startswith("x-kubernetes")
    }


def references(value: Any) -> set[str]:
    """The names of all definitions that it refers to."""
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
    return own.union(*map(references, value.values()))


def kubernetes(definitions: dict[str, Any]) -> dict[str, Any]:
    """The kinds, and all that they refer to."""
    roots = {kind: f"io.k8s.api.{name}" for kind, name in KINDS.items()}
    kept: dict[str, Any] = {}
    todo = set(roots.values())
    while todo:
        name = todo.pop()
        kept[name] = bare(definitions[name])
        todo |= references(kept[name]) - set(kept)
    text = json.dumps({"roots": roots, "$defs": kept}, sort_keys=True)
    return json.loads(text.replace("_definitions.json#/$defs/", "#/$defs/"))  # type: ignore[no-any-return]


def write(name: str, schema: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write("kubernetes.json", kubernetes(json.loads((source / KUBERNETES).read_text())["$defs"]))
    write("compose.json", bare(json.loads((source / COMPOSE).read_text())))
