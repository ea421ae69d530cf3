"""Checks Kubernetes objects: types, and no field that the API does not have (Kubernetes drops those without a word).

Core kinds and RayCluster by their published schemas (tests/data/schemas), RayCluster by those of several KubeRay
versions. ServiceMonitor's fields are written down here.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jsonschema

from harness.places import DATA

SCHEMAS = DATA / "schemas"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
TEXT, FLAG = {"type": "string"}, {"type": "boolean"}
CORE = "#/$defs/io.k8s.api.core.v1."
META = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
SELECTOR = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector"}


def fields(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object", "properties": dict(properties), "required": list(required), "additionalProperties": False,
    }  # fmt: skip


def custom(version: str, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return fields(
        {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": META, "spec": dict(spec)},
        "apiVersion", "kind", "metadata", "spec",
    )  # fmt: skip


RELABELING = fields(
    {
        "action": {"enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep"]},
        "modulus": COUNT,
        "regex": TEXT,
        "replacement": TEXT,
        "separator": TEXT,
        "sourceLabels": {"type": "array", "items": TEXT},
        "targetLabel": TEXT,
    }
)
SERVICE_MONITOR = custom(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    fields(
        {
            "selector": SELECTOR,
            "jobLabel": TEXT,
            "endpoints": {
                "type": "array",
                "items": fields(
                    {
                        "port": TEXT,
                        "path": TEXT,
                        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                        "scrapeTimeout": TEXT,
                        "relabelings": {"type": "array", "items": RELABELING},
                        "metricRelabelings": {"type": "array", "items": RELABELING},
                    }
                ),
            },
        },
        "selector", "endpoints",
    ),
)  # fmt: skip
CUSTOM = {"ServiceMonitor": SERVICE_MONITOR}
# Labels and resources have fields of their own, and the operator refuses them among the parameters of `ray start`.
REFUSED_PARAMETERS = {"labels", "resources"}


@functools.cache
def core() -> dict[str, Any]:
    """The published schemas, with unknown fields refused everywhere."""
    found: dict[str, Any] = json.loads((SCHEMAS / "kubernetes.json").read_text())
    return {"roots": found["roots"], "$defs": closed(found["$defs"])}


def closed(schema: Any) -> Any:
    """The schema in which an object with fields has no others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(item) for key, item in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made and "type" in made:
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = CUSTOM.get(kind) or {"$ref": f"#/$defs/{core()['roots'][kind]}"}
    return jsonschema.Draft202012Validator({**schema, "$defs": core()["$defs"]})


def kuberay_versions() -> list[str]:
    """Whose schemas are here."""
    return list(_kuberay()["roots"])


@functools.cache
def _kuberay() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / "kuberay.json").read_text())
    return {"roots": closed(found["roots"]), "$defs": closed(found["$defs"])}


@functools.cache
def ray_cluster(version: str) -> jsonschema.Draft202012Validator:
    schema = _kuberay()["roots"][version]
    properties = {**schema["properties"], "metadata": META}
    return jsonschema.Draft202012Validator(
        {**schema, "properties": properties, "$defs": {**core()["$defs"], **_kuberay()["$defs"]}}
    )


def problems(value: Mapping[str, Any]) -> list[str]:
    """What the API would not take of an object; nothing for a good one."""
    if value["kind"] != "RayCluster":
        return told(validator(value["kind"]), value)
    found = [f"{version}: {what}" for version in kuberay_versions() for what in told(ray_cluster(version), value)]
    if value.get("apiVersion") != "ray.io/v1":
        found.append("apiVersion: not ray.io/v1")
    for group in (value["spec"].get("headGroupSpec", {}), *value["spec"].get("workerGroupSpecs", ())):
        found += [f"rayStartParams: {name}" for name in REFUSED_PARAMETERS & set(group.get("rayStartParams", ()))]
    return found


def told(checker: jsonschema.Draft202012Validator, value: Any) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in checker.iter_errors(value)]
