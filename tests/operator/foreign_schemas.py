"""What the CRDs of others say of the fields that Kvasir writes, as read in their projects; others are errors.

- InferencePool `inference.networking.k8s.io/v1`: kubernetes-sigs/gateway-api-inference-extension, config/crd,
  v1.0.0 to v1.6.0. They differ in `targetPorts` (one port in 1.0, eight since) and in whether `endpointPickerRef`
  is required (up to 1.5).
- LeaderWorkerSet `leaderworkerset.x-k8s.io/v1`: kubernetes-sigs/lws, config/crd, v0.7.0 and v0.9.0 (as main of
  August 2026, before 0.10). The pod templates are those of Kubernetes.
- HTTPRoute `gateway.networking.k8s.io/v1`: backendRefs with group and kind.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema

Schema = dict[str, Any]
_LABEL = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
_GROUP = r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_KIND = r"^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"


def fields(required: str = "", **properties: Any) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": required.split(),
    }


def text(pattern: str = "", least: int = 0, most: int = 253) -> Schema:
    return {"type": "string", "pattern": pattern, "minLength": least, "maxLength": most}


def number(least: int, most: int = 2**31 - 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


PORT = fields("number", number=number(1, 65535))
LABELS = {"type": "object", "additionalProperties": text(_LABEL, 0, 63), "minProperties": 1, "maxProperties": 64}


def _pool(ports: int, picker: str) -> Schema:
    reference = fields(
        "name port",  # of a Service, which needs its port
        group=text(_GROUP),
        kind=text(_KIND, 1, 63),
        name=text("", 1),
        port=PORT,
        failureMode=one_of("FailOpen", "FailClose"),
    )
    return fields(
        f"selector targetPorts {picker}",
        selector=fields("matchLabels", matchLabels=LABELS),
        targetPorts={"type": "array", "items": PORT, "minItems": 1, "maxItems": ports, "uniqueItems": True},
        endpointPickerRef=reference,
    )


INFERENCE_POOL = {"v1.0.0": _pool(1, "endpointPickerRef"), "v1.6.0": _pool(8, "")}
BACKEND = fields(
    "name", group=text(_GROUP), kind=text(_KIND, 1, 63), name=text("", 1), port=number(1, 65535), weight=number(0)
)

ANYTHING: Schema = {"type": "object"}
_ROLLING = fields(partition=number(0), maxUnavailable={}, maxSurge={})


def _sets(restarts: Schema, **more: Schema) -> Schema:
    group = fields(
        "workerTemplate",
        leaderTemplate=ANYTHING,
        workerTemplate=ANYTHING,
        size=number(1),
        restartPolicy=restarts,
        subGroupPolicy=ANYTHING,
        **more,
    )
    return fields(
        "leaderWorkerTemplate",
        replicas=number(0),
        leaderWorkerTemplate=group,
        startupPolicy=one_of("LeaderCreated", "LeaderReady"),
        rolloutStrategy=fields("type", type=one_of("RollingUpdate"), rollingUpdateConfiguration=_ROLLING),
        networkConfig=fields("subdomainPolicy", subdomainPolicy=one_of("Shared", "UniquePerReplica")),
    )


LEADER_WORKER_SET = {
    "v0.7.0": _sets(one_of("Default", "RecreateGroupOnPodRestart", "None")),
    "v0.9.0": _sets(
        one_of("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        volumeClaimTemplates={"type": "array"},
        persistentVolumeClaimRetentionPolicy=ANYTHING,
    ),
}


def refusals(schema: Schema, value: Any) -> Iterator[str]:
    """What is wrong with a value, each with its path."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        yield f"{error.json_path}: {error.message}"
