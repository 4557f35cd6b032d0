"""The model in a pod: mounts, the cache, the hub's token, and whether a Job loads it beforehand."""

from kvasir_engine.model.loading.uri import ClaimURI, HubURI, PackageURI
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_engine.quantity import amount
from kvasir_operator.api import InferenceService, Model
from kvasir_operator.render.names import Object

CACHE_PATH = "/var/cache/kvasir"
MODELS_PATH = "/models"
CACHE_VOLUMES = ("cache", "cache-claim", "cache-host")
HUB_PATH = "/etc/kvasir/hub"
HUB_KEY = "token"

# A worker that does not listen after this is restarted, where the spec does not say how large the model is.
STARTUP_SECONDS = 3600
# Beside loading: start of the program, the image's kernels, warming up.
_START_SECONDS = 300
# What slow ways still give, in bytes a second: a hub across the internet, a network file system.
_DOWNLOAD_RATE = 50e6
_READ_RATE = 200e6


def downloads(service: InferenceService) -> bool:
    """Whether the model comes from outside the cluster."""
    return isinstance(parse_uri(service.spec.model.uri), HubURI | PackageURI)


def preloads(service: InferenceService) -> bool:
    """Whether a Job loads the model before workers start."""
    return downloads(service) and bool(service.spec.model.cache.claim_name)


def startup_seconds(service: InferenceService) -> int:
    """How long a pod may take until it listens."""
    size = float(amount(service.spec.model.size) or 0)
    if not size:
        return STARTUP_SECONDS
    slow = downloads(service) and not preloads(service)
    return int(_START_SECONDS + size / (_DOWNLOAD_RATE if slow else _READ_RATE))


def mount_model(service: InferenceService, main: Object, spec: Object, token: bool) -> None:
    """Give the container `main` of the pod `spec` the model's volume, the cache and, if asked, the hub's token."""
    cache = _cache(service)
    main["volumeMounts"].append({"name": cache["name"], "mountPath": CACHE_PATH})
    spec["volumes"].append(cache)
    uri, secret = parse_uri(service.spec.model.uri), service.spec.model.token_secret_name
    if isinstance(uri, ClaimURI):
        main["volumeMounts"].append({"name": "model", "mountPath": f"{MODELS_PATH}/{uri.claim}", "readOnly": True})
        spec["volumes"].append(
            {"name": "model", "persistentVolumeClaim": {"claimName": uri.claim, "readOnly": True}}
        )
    if secret and token:
        # A file, not a variable: it is in no process's environment, and a new token needs no new pod.
        main["env"].append({"name": "HF_TOKEN_PATH", "value": f"{HUB_PATH}/{HUB_KEY}"})
        main["volumeMounts"].append({"name": "hub-token", "mountPath": HUB_PATH, "readOnly": True})
        items = [{"key": HUB_KEY, "path": HUB_KEY}]
        spec["volumes"].append(
            {"name": "hub-token", "secret": {"secretName": secret, "items": items, "defaultMode": 0o440}}
        )


def _cache(service: InferenceService) -> Object:
    """The volume. Each kind has its name: an API server merges namesakes, and refuses what is of two kinds then."""
    cache = service.spec.model.cache
    if cache.claim_name:
        return {"name": "cache-claim", "persistentVolumeClaim": {"claimName": cache.claim_name}}
    if cache.host_path:
        return {"name": "cache-host", "hostPath": {"path": cache.host_path, "type": "Directory"}}
    return {"name": "cache", "emptyDir": {}}


def model_uri_in_pod(model: Model) -> str:
    """The model's URI as the engine reads it: a claim is a mounted folder there."""
    uri = parse_uri(model.uri)
    if isinstance(uri, ClaimURI):
        return f"file://{MODELS_PATH}/{uri.claim}" + (f"/{uri.path}" if uri.path else "")
    return str(uri)
