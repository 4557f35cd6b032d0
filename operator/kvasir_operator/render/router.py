"""The router: its Deployment, and the right to watch its workers' pods."""

from kvasir_operator.render.names import (
    REVISION_LABEL,
    Object,
    labels,
    metadata,
    revision_of,
    router_name,
    selector,
    worker_selector,
)
from kvasir_operator.render.options import Options, Static
from kvasir_operator.render.pod import STARTUP_SECONDS, container, drain_args, model_args, pod_spec
from kvasir_operator.spec import InferenceService

KEYS_PATH = "/etc/kvasir/api-keys"
REQUESTS = {"cpu": "1", "memory": "1Gi"}
# What the router does at the API server, and so all that its Role allows.
POD_VERBS = ["list", "watch"]


def router(service: InferenceService, options: Options) -> list[Object]:
    """The router's objects. With static discovery it needs no API server, so no account either."""
    if isinstance(options.discovery, Static):
        return [_deployment(service, options)]
    return [*_access(service), _deployment(service, options)]


def _deployment(service: InferenceService, options: Options) -> Object:
    own_labels = labels(service, "router")
    template = {"metadata": {"labels": dict(own_labels)}, "spec": _pod(service, options)}
    template["metadata"]["labels"][REVISION_LABEL] = revision_of(template)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(service, router_name(service), own_labels),
        "spec": {
            "replicas": service.spec.router.replicas,
            "progressDeadlineSeconds": STARTUP_SECONDS,
            "selector": {"matchLabels": selector(service, "router")},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def _pod(service: InferenceService, options: Options) -> Object:
    args = ["router", *model_args(service), *_discovery_args(service, options), *drain_args(service)]
    main = container(options.engine_image, args, {}, {"requests": dict(REQUESTS)})
    spec = pod_spec(service, main)
    if not isinstance(options.discovery, Static):
        spec["serviceAccountName"] = router_name(service)
        spec["automountServiceAccountToken"] = True
    if secret := service.spec.router.auth.secret_name:
        main["args"] += ["--api-keys-file", KEYS_PATH]
        main["volumeMounts"].append({"name": "api-keys", "mountPath": KEYS_PATH, "readOnly": True})
        spec["volumes"].append({"name": "api-keys", "secret": {"secretName": secret, "defaultMode": 0o440}})
    return spec


def _discovery_args(service: InferenceService, options: Options) -> list[str]:
    if isinstance(options.discovery, Static):
        return [arg for url in options.discovery.urls for arg in ("--worker", url)]
    return ["--watch-pods", worker_selector(service)]


def _access(service: InferenceService) -> list[Object]:
    name, own_labels = router_name(service), labels(service, "router")
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(service, name, own_labels)},
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": metadata(service, name, own_labels),
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": POD_VERBS}],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata(service, name, own_labels),
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": service.namespace}],
        },
    ]
