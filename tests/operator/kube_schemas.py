"""The OpenAPI schemas that API servers publish, 1.25 to 1.37, as the package kubernetes-validate carries them."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource

FOLDER = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Those that a service is to run on. The newest one is that from which the operator's table of pod fields is made.
VERSIONS = tuple(f"1.{minor}" for minor in range(30, 38))
# What is defined by CRDs, of which there are no schemas here.
ELSEWHERE = (
    "leaderworkerset.x-k8s.io/",
    "gateway.networking.k8s.io/",
    "inference.networking.k8s.io/",
    "monitoring.coreos.com/",
    "cert-manager.io/",
    "serving.kvasir.dev/",
    "kustomize.config.k8s.io/",
)


@cache
def definitions(version: str) -> dict[str, Any]:
    """All types of a version by their full names."""
    text = (FOLDER / f"v{version}.0-local-strict/_definitions.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """Checks objects of a kind as a server of that version does: unknown fields are errors."""
    all_types = definitions(version)
    registry: Registry[Any] = Resource.from_contents(all_types) @ Registry()
    for name, schema in all_types["$defs"].items():
        for each in schema.get("x-kubernetes-group-version-kind", ()):
            group = f"{each['group']}/{each['version']}" if each["group"] else each["version"]
            if (group, each["kind"]) == (api_version, kind):
                reference = {"$ref": f"{all_types['$id']}#/$defs/{name}"}
                return jsonschema.Draft202012Validator(reference, registry=registry)
    raise LookupError(f"{api_version} {kind} is not in {version}")


def complaints(item: dict[str, Any], version: str) -> Iterator[str]:
    """What a server of that version has against an object."""
    if item["apiVersion"].startswith(ELSEWHERE):
        return
    for error in validator(version, item["apiVersion"], item["kind"]).iter_errors(item):
        yield f"{version} {item['kind']} {item['metadata']['name']}: {error.json_path}: {error.message}"
    yield from _nulls(item, f"{version} {item['kind']} {item['metadata']['name']}: $")
    yield from _twice(item, f"{version} {item['kind']} {item['metadata']['name']}: $")


def _nulls(value: Any, path: str) -> Iterator[str]:
    """The schemas take null for nearly everything; it is never what is meant."""
    if value is None:
        yield f"{path}: null"
    for key, below in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _nulls(below, f"{path}.{key}")


# Lists of which server-side apply refuses to own two items of the same keys (x-kubernetes-list-map-keys).
_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "imagePullSecrets": ("name",),
    "resourceClaims": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "ports": ("containerPort", "port", "protocol"),
}


def _twice(value: Any, path: str, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _twice(below, f"{path}.{key}", key)
    elif isinstance(value, list):
        keys = [tuple(str(each.get(key)) for key in _KEYS[name]) for each in value if name in _KEYS]
        if len(set(keys)) < len(keys):
            yield f"{path}: items of the same keys"
        for index, below in enumerate(value):
            yield from _twice(below, f"{path}[{index}]")
