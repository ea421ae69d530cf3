"""Makes kubernetes.json, compose.json and kuberay.json: `python minify.py DIR`, where DIR has

kubernetes_validate, check_jsonschema: pip install --no-deps --target DIR kubernetes-validate==1.37.0 check-jsonschema==0.39.0
kuberay/v1.5.1.yaml, v1.6.2.yaml, v1.7.0.yaml: helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml of these tags
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

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


KUBERAY = ("v1.5.1", "v1.6.2", "v1.7.0")
SHARED_CHARACTERS = 120  # subtrees below that are cheaper repeated


def kuberay(source: Path) -> dict[str, Any]:
    """RayCluster's schema of each version; subtrees that come twice or more are definitions."""
    trees = {version: crd(source / f"{version}.yaml") for version in KUBERAY}
    counts = Counter(text for tree in trees.values() for text in subtrees(tree))
    found: dict[str, Any] = {}

    def shared(value: Any, *, is_root: bool = False) -> Any:
        if isinstance(value, list):
            return [shared(item) for item in value]
        if not isinstance(value, dict):
            return value
        text = json.dumps(value, sort_keys=True)
        made = {key: shared(item) for key, item in value.items()}
        if is_root or counts[text] < 2:
            return made
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        found[name] = made
        return {"$ref": f"#/$defs/{name}"}

    return {"roots": {version: shared(tree, is_root=True) for version, tree in trees.items()}, "$defs": found}


def crd(path: Path) -> dict[str, Any]:
    """The schema of a CustomResourceDefinition's version v1."""
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema: dict[str, Any] = described_not(version["schema"]["openAPIV3Schema"])
    return schema


def described_not(value: Any) -> Any:
    """Without descriptions; `x-kubernetes-int-or-string` and unknown fields that are kept do check something."""
    if isinstance(value, list):
        return [described_not(item) for item in value]
    if not isinstance(value, dict):
        return value
    checks = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")
    return {
        key: described_not(item)
        for key, item in value.items()
        if not (key == "description" and isinstance(item, str))
        and (not key.startswith("x-kubernetes") or key in checks)
    }


def subtrees(value: Any) -> list[str]:
    """All that are large enough to be shared, as text."""
    if isinstance(value, list):
        return [text for item in value for text in subtrees(item)]
    if not isinstance(value, dict):
        return []
    text = json.dumps(value, sort_keys=True)
    own = [text] if "type" in value and len(text) > SHARED_CHARACTERS else []
    return own + [text for item in value.values() for text in subtrees(item)]


def write(name: str, schema: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write("kubernetes.json", kubernetes(json.loads((source / KUBERNETES).read_text())["$defs"]))
    write("compose.json", bare(json.loads((source / COMPOSE).read_text())))
    write("kuberay.json", kuberay(source / "kuberay"))
