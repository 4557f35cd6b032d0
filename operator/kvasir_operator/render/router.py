"""The router's Deployment."""

from kvasir_operator.api import InferenceService
from kvasir_operator.render.defaults import router_resources
from kvasir_operator.render.merge import merged, with_spec_resources
from kvasir_operator.render.monitoring import SCRAPE_ANNOTATIONS
from kvasir_operator.render.names import (
    REVISION_LABEL,
    Object,
    labels,
    metadata,
    ownerless,
    revision_of,
    router_name,
    selector,
    worker_selector,
)
from kvasir_operator.render.options import CERTIFICATES, Options, StaticWorkers
from kvasir_operator.render.pod import container, drain_args, model_args, serving_pod, tls_args
from kvasir_operator.render.storage import startup_seconds

KEYS_PATH = "/etc/kvasir/api-keys"


def router_deployment(service: InferenceService, options: Options) -> Object:
    """The Deployment of the router; Kubernetes rolls it by itself."""
    own_labels = labels(service, "router")
    template = _template(service, options)
    template["metadata"]["labels"][REVISION_LABEL] = revision_of(_template(ownerless(service), options))
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(service, router_name(service), own_labels),
        "spec": {
            "replicas": service.spec.router.replicas,
            "progressDeadlineSeconds": startup_seconds(service),
            "selector": {"matchLabels": selector(service, "router")},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def _template(service: InferenceService, options: Options) -> Object:
    """The pod template without its revision, the spec's overlay applied."""
    metadata = {"labels": labels(service, "router"), "annotations": dict(SCRAPE_ANNOTATIONS)}
    return merged({"metadata": metadata, "spec": _pod(service, options)}, service.spec.router)


def _pod(service: InferenceService, options: Options) -> Object:
    args = ["router", *model_args(service), *_discovery_args(service, options), *tls_args(service, "router")]
    args += drain_args(service)
    if holds := service.spec.scaling.holds:
        args += ["--hold-seconds", str(holds.hold_seconds), "--hold-requests", str(holds.hold_requests)]
    main = container(options, args, {}, with_spec_resources(router_resources(options), service.spec.router))
    spec = serving_pod(service, "router", main, options)
    if service.spec.router.image:
        main["image"] = service.spec.router.image
    if options.in_cluster:
        spec["automountServiceAccountToken"] = True
    if secret := service.spec.router.auth.secret_name:
        main["args"] += ["--api-keys-file", KEYS_PATH]
        main["volumeMounts"].append({"name": "api-keys", "mountPath": KEYS_PATH, "readOnly": True})
        spec["volumes"].append({"name": "api-keys", "secret": {"secretName": secret, "defaultMode": 0o440}})
    return spec


def _discovery_args(service: InferenceService, options: Options) -> list[str]:
    if isinstance(options.discovery, StaticWorkers):
        return [arg for url in options.discovery.urls for arg in ("--worker", url)]
    follows = service.uid and options.defaults >= CERTIFICATES
    owner = ["--watch-owner", service.uid] if follows else []
    return ["--watch-pods", worker_selector(service), *owner]
