"""How clients reach the router: its Service, and an Ingress or HTTPRoute before it. Only /v1 leaves the cluster."""

from collections.abc import Sequence

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import Object, labels, metadata, router_name, selector

SERVICE_PORT = 80
# ingress-nginx cuts a response of which it reads nothing for 60 seconds, and buffers what it reads.
NGINX = {
    "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
    "nginx.ingress.kubernetes.io/proxy-send-timeout": "3600",
    "nginx.ingress.kubernetes.io/proxy-buffering": "off",
}
PUBLIC_PATH = "/v1"


def network(service: InferenceService) -> list[Object]:
    """The router's Service, and what the spec puts in front of it."""
    expose = service.spec.router.expose
    match expose.type:
        case "Ingress":
            found = [_service(service), _ingress(service)]
        case "HTTPRoute":
            found = [_service(service), _route(service)]
        case _:
            found = [_service(service)]
    annotations = {**(NGINX if expose.type == "Ingress" else {}), **expose.annotations}
    if annotations:
        found[-1]["metadata"]["annotations"] = annotations
    return found


def url(service: InferenceService, objects: Sequence[Object]) -> str:
    """Where clients find the API, less its /v1: outside where `objects` have a host to ask for, else inside."""
    expose = service.spec.router.expose
    exposed = any(item["kind"] == expose.type for item in objects)
    if exposed and expose.host and not expose.host.startswith("*"):
        return f"{'https' if expose.tls_secret_name else 'http'}://{expose.host}"
    return f"http://{router_name(service)}.{service.namespace}.svc"


def _service(service: InferenceService) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(service, router_name(service), labels(service, "router")),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(service, "router"),
            "ports": [{"name": "http", "port": SERVICE_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _ingress(service: InferenceService) -> Object:
    expose = service.spec.router.expose
    backend = {"service": {"name": router_name(service), "port": {"name": "http"}}}
    rule: Object = {"http": {"paths": [{"path": PUBLIC_PATH, "pathType": "Prefix", "backend": backend}]}}
    spec: Object = {"rules": [{"host": expose.host, **rule} if expose.host else rule]}
    if expose.class_name:
        spec["ingressClassName"] = expose.class_name
    if expose.tls_secret_name:
        hosts = {"hosts": [expose.host]} if expose.host else {}
        spec["tls"] = [{**hosts, "secretName": expose.tls_secret_name}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": metadata(service, router_name(service), labels(service, "router")),
        "spec": spec,
    }


def _route(service: InferenceService) -> Object:
    expose = service.spec.router.expose
    namespace, _, gateway = expose.class_name.rpartition("/")
    parent = {"name": gateway, **({"namespace": namespace} if namespace else {})}
    spec: Object = {
        "parentRefs": [parent],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": PUBLIC_PATH}}],
                "backendRefs": [{"name": router_name(service), "port": SERVICE_PORT}],
            }
        ],
    }
    if expose.host:
        spec["hostnames"] = [expose.host]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(service, router_name(service), labels(service, "router")),
        "spec": spec,
    }
