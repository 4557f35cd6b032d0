"""The CustomResourceDefinition, generated from the types. Pure.

It keeps to what structural schemas of API server 1.20 know, but for the rules of `cel_rules.py`: a server before
1.25 drops them, or refuses them when they come by server-side apply, as Helm 4 installs.
"""

import copy
from typing import Any

import yaml

from kvasir_operator.api import GROUP, KIND, PLURAL, ROLE_KIND, ROLE_PLURAL, VERSION, object_schema
from kvasir_operator.api.cel_rules import add_rules
from kvasir_operator.api.structural_schema import Schema, structural
from kvasir_operator.status.derive import Status

_COLUMNS = [
    {"name": "Model", "type": "string", "jsonPath": ".status.model"},
    {"name": "Prefill", "type": "string", "jsonPath": ".status.prefill.summary"},
    {"name": "Decode", "type": "string", "jsonPath": ".status.decode.summary"},
    {"name": "URL", "type": "string", "jsonPath": ".status.url"},
    {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
    {"name": "Image", "type": "string", "jsonPath": ".status.release.image", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def crd(rules: bool = True) -> dict[str, Any]:
    """The CRD as an object, with its CEL rules or without."""
    schema = copy.deepcopy(object_schema())
    if rules:
        add_rules(schema["properties"]["spec"])
    schema["properties"]["status"] = {**_status_schema(), "description": "What is there."}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["kvi"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _COLUMNS,
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "A language model served with prefill and decode on separate pools.",
                            **schema,
                        }
                    },
                }
            ],
        },
    }


def role_crd() -> dict[str, Any]:
    """The CRD of InferenceRole: what an autoscaler scales where a service leaves its replicas to one."""
    replicas = {"type": "integer", "minimum": 0, "maximum": 10_000, "description": "Number of workers."}
    spec = {
        "replicas": replicas,
        "selector": {
            "type": "string",
            "description": "Label selector of the role's pods, for the scale subresource.",
        },
    }
    ready = {"type": "integer", "description": "Workers that are ready."}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{ROLE_PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": ROLE_KIND,
                "listKind": f"{ROLE_KIND}List",
                "plural": ROLE_PLURAL,
                "singular": ROLE_KIND.lower(),
                "shortNames": ["kvr"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".spec.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": "Replicas", "type": "integer", "jsonPath": ".spec.replicas"},
                        {"name": "Ready", "type": "integer", "jsonPath": ".status.replicas"},
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "The size of one role of an InferenceService, which makes and owns it.",
                            "type": "object",
                            "properties": {
                                "spec": {"type": "object", "description": "What is wanted.", "properties": spec},
                                "status": {
                                    "type": "object",
                                    "description": "What is there.",
                                    "properties": {"replicas": ready},
                                },
                            },
                        }
                    },
                }
            ],
        },
    }


def _status_schema() -> Schema:
    schema = structural(Status)
    _strip(schema)
    conditions = schema["properties"]["conditions"]
    conditions["x-kubernetes-list-type"] = "map"
    conditions["x-kubernetes-list-map-keys"] = ["type"]
    return schema


def _strip(schema: Schema) -> None:
    """Status fields have no defaults: what is absent was not observed."""
    schema.pop("default", None)
    for below in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])):
        _strip(below)


def crd_yaml(rules: bool = True) -> str:
    """The CRD as the YAML that stands in `crds/`."""
    return _generated(crd(rules), "crd")


def role_crd_yaml() -> str:
    """The CRD of InferenceRole as YAML."""
    return _generated(role_crd(), "crd --roles")


def _generated(definition: dict[str, Any], command: str) -> str:
    text = yaml.safe_dump(definition, sort_keys=False, width=110)
    return f"# Generated by `kvasir-operator {command}`; do not edit.\n{text}"
