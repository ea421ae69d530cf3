"""Checks Kubernetes objects: types, and no field that the API does not have (Kubernetes drops those without a word).

Core kinds by their published schemas (tests/data/schemas). The fields of RayCluster and ServiceMonitor are written down
here: of a RayCluster those that KubeRay 1.5.1, 1.6.2 and 1.7.0 all have.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

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


def ray_group(more: Mapping[str, Any], *required: str) -> dict[str, Any]:
    common = {
        # Labels as the operator checks them; it refuses them among the parameters of `ray start`.
        "labels": TEXTS,
        "rayStartParams": {**TEXTS, "propertyNames": {"not": {"enum": ["labels", "resources"]}}},
        "resources": TEXTS,
        "template": {"$ref": CORE + "PodTemplateSpec"},
    }
    return fields({**common, **more}, "template", *required)


RAY_CLUSTER = custom(
    "ray.io/v1",
    "RayCluster",
    fields(
        {
            "rayVersion": TEXT,
            "authOptions": fields({"mode": {"enum": ["disabled", "token"]}}),
            "enableInTreeAutoscaling": FLAG,
            "autoscalerOptions": fields(
                {
                    "version": {"enum": ["v1", "v2"]},
                    "idleTimeoutSeconds": COUNT,
                    "image": TEXT,
                    "imagePullPolicy": TEXT,
                    "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                    "resources": {"$ref": CORE + "ResourceRequirements"},
                    "securityContext": {"$ref": CORE + "SecurityContext"},
                    "env": {"type": "array", "items": {"$ref": CORE + "EnvVar"}},
                    "envFrom": {"type": "array", "items": {"$ref": CORE + "EnvFromSource"}},
                    "volumeMounts": {"type": "array", "items": {"$ref": CORE + "VolumeMount"}},
                }
            ),
            "gcsFaultToleranceOptions": {"type": "object"},
            "headServiceAnnotations": TEXTS,
            "managedBy": TEXT,
            "suspend": FLAG,
            "headGroupSpec": ray_group(
                {"enableIngress": FLAG, "headService": {"type": "object"}, "serviceType": TEXT}
            ),
            "workerGroupSpecs": {
                "type": "array",
                "minItems": 1,
                "items": ray_group(
                    {
                        "groupName": TEXT,
                        "replicas": COUNT,
                        "minReplicas": COUNT,
                        "maxReplicas": COUNT,
                        "numOfHosts": COUNT,
                        "idleTimeoutSeconds": COUNT,
                        "suspend": FLAG,
                        "scaleStrategy": {"type": "object"},
                    },
                    "groupName", "minReplicas", "maxReplicas",
                ),
            },
        },
        "headGroupSpec",
    ),
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
CUSTOM = {"RayCluster": RAY_CLUSTER, "ServiceMonitor": SERVICE_MONITOR}


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


def problems(value: Mapping[str, Any]) -> list[str]:
    """What the API would not take of an object; nothing for a good one."""
    return told(validator(value["kind"]), value)


def told(checker: jsonschema.Draft202012Validator, value: Any) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in checker.iter_errors(value)]


def real_crd(path: Path) -> jsonschema.Draft202012Validator:
    """The schema of a CustomResourceDefinition's version v1."""
    definition = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)
