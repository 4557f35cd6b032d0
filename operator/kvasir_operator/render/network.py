"""How clients reach the router: its Service, and what the spec puts before it: an Ingress, an HTTPRoute, or an
InferencePool with or without an HTTPRoute to it. Only /v1 leaves the cluster."""

from collections.abc import Sequence

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import Object, labels, metadata, router_name, selector
from kvasir_operator.render.pod import PORT

SERVICE_PORT = 80
# ingress-nginx cuts a response of which it reads nothing for 60 seconds, and buffers what it reads.
NGINX = {
    "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
    "nginx.ingress.kubernetes.io/proxy-send-timeout": "3600",
    "nginx.ingress.kubernetes.io/proxy-buffering": "off",
}
PUBLIC_PATH = "/v1"
POOL_GROUP, POOL_KIND = "inference.networking.k8s.io", "InferencePool"
# What clients outside come by.
WAYS_IN = frozenset({"Ingress", "HTTPRoute", POOL_KIND})


def network(service: InferenceService) -> list[Object]:
    """The router's Service, and what the spec puts in front of it."""
    expose = service.spec.router.expose
    match expose.type:
        case "Ingress":
            found = [_service(service), _ingress(service)]
        case "HTTPRoute":
            found = [_service(service), _route(service, {"name": router_name(service), "port": SERVICE_PORT})]
        case "InferencePool":
            backend = {"group": POOL_GROUP, "kind": POOL_KIND, "name": router_name(service)}
            route = [_route(service, backend)] if expose.class_name else []
            found = [_service(service), *route, _pool(service)]
        case _:
            found = [_service(service)]
    annotations = {**(NGINX if expose.type == "Ingress" else {}), **expose.annotations}
    if annotations:
        found[-1]["metadata"]["annotations"] = annotations
    return found


def url(service: InferenceService, objects: Sequence[Object]) -> str:
    """The base URL of the API without its /v1: outside the cluster where `objects` have a host, else inside."""
    expose = service.spec.router.expose
    exposed = {item["kind"] for item in objects} & WAYS_IN - {POOL_KIND}
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


def _route(service: InferenceService, backend: Object) -> Object:
    expose = service.spec.router.expose
    namespace, _, gateway = expose.class_name.rpartition("/")
    parent = {"name": gateway, **({"namespace": namespace} if namespace else {})}
    spec: Object = {
        "parentRefs": [parent],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": PUBLIC_PATH}}],
                "backendRefs": [backend],
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


def _pool(service: InferenceService) -> Object:
    """The routers as endpoints, of which the picker chooses. Workers are the routers' to choose."""
    picker = service.spec.router.expose.endpoint_picker
    assert picker is not None  # or the spec is refused
    return {
        "apiVersion": f"{POOL_GROUP}/v1",
        "kind": POOL_KIND,
        "metadata": metadata(service, router_name(service), labels(service, "router")),
        "spec": {
            "selector": {"matchLabels": selector(service, "router")},
            "targetPorts": [{"number": PORT}],
            "endpointPickerRef": {
                "group": "",
                "kind": "Service",
                "name": picker.name,
                "port": {"number": picker.port},
                "failureMode": picker.failure_mode,
            },
        },
    }
