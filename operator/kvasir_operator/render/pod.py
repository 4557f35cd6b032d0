"""What the pods of all roles share: container, probes, security, model and cache volumes."""

from kvasir_engine.model.uri import ClaimURI
from kvasir_engine.model.uri import parse as parse_uri
from kvasir_operator.render.names import Object
from kvasir_operator.spec import InferenceService, Model

CONTAINER = "kvasir"
PORT = 8000
CACHE_PATH = "/var/cache/kvasir"
MODELS_PATH = "/models"

# Loading a large model from a slow hub takes long; a pod that still does not listen after this is restarted.
STARTUP_SECONDS = 3600
STARTUP_PERIOD_SECONDS = 2
# Beyond the drain deadline: time to close connections, deregister memory and exit.
GRACE_SECONDS = 15
# Group of the mounted volumes: the engine's image runs as this user.
USER_ID = 65532


def container(image: str, args: list[str], env: dict[str, str], resources: Object) -> Object:
    """The kvasir container, with the volumes that every role has mounted."""
    return {
        "name": CONTAINER,
        "image": image,
        "command": ["kvasir"],
        "args": args,
        "env": [{"name": name, "value": value} for name, value in {"KVASIR_CACHE": CACHE_PATH, **env}.items()],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": resources,
        "startupProbe": {
            **_probe("/health", STARTUP_PERIOD_SECONDS),
            "failureThreshold": STARTUP_SECONDS // STARTUP_PERIOD_SECONDS,
        },
        "readinessProbe": {**_probe("/ready", 2), "failureThreshold": 2},
        "livenessProbe": {**_probe("/health", 10), "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE_PATH},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _probe(path: str, period: int) -> Object:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period, "timeoutSeconds": 5}


def pod_spec(service: InferenceService, main: Object) -> Object:
    """A pod of one container, with what a restricted namespace asks for."""
    spec: Object = {
        "containers": [main],
        "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": service.spec.drain.deadline_seconds + GRACE_SECONDS,
    }
    uri = parse_uri(service.spec.model.uri)
    if isinstance(uri, ClaimURI):
        main["volumeMounts"].append({"name": "model", "mountPath": f"{MODELS_PATH}/{uri.claim}", "readOnly": True})
        spec["volumes"].append(
            {"name": "model", "persistentVolumeClaim": {"claimName": uri.claim, "readOnly": True}}
        )
    return spec


def model_args(service: InferenceService) -> list[str]:
    """The flags that tell any role which model is served; what the spec leaves to the engine is left out."""
    model = service.spec.model
    args = ["--model", model_uri_in_pod(model), "--served-model-name", service.served_name]
    if model.revision:
        args += ["--revision", model.revision]
    if model.max_length:
        args += ["--max-length", str(model.max_length)]
    return args


def model_uri_in_pod(model: Model) -> str:
    """The model's URI as the engine reads it: a claim is a mounted folder there."""
    uri = parse_uri(model.uri)
    if isinstance(uri, ClaimURI):
        return f"file://{MODELS_PATH}/{uri.claim}" + (f"/{uri.path}" if uri.path else "")
    return str(uri)


def drain_args(service: InferenceService) -> list[str]:
    """The flags that tell any role how long it may take to leave."""
    return ["--drain-seconds", str(service.spec.drain.deadline_seconds)]
