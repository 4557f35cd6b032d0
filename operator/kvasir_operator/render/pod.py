"""What the pods of all roles share: container, probes, security, accounts, and where they prefer to be."""

from kvasir_operator.api import InferenceService
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.api.validation import CA_VARIABLES
from kvasir_operator.render.names import Object, Role, role_name, tls_secret_name
from kvasir_operator.render.options import ENTRYPOINT, Options
from kvasir_operator.render.placement import spread
from kvasir_operator.render.storage import (
    CACHE_PATH,
    model_uri_in_pod,
    mount_model,
    preloads,
    startup_seconds,
)

CA_PATH = "/etc/kvasir/ca"
TLS_PATH = "/etc/kvasir/tls"
TLS_VOLUME = "tls"
PORT = 8000
# Where a worker speaks to routers, by mutual TLS.
WORKER_PORT = 8443
WORKER_PORT_NAME = "worker"

STARTUP_PERIOD_SECONDS = 2
# Beyond the drain deadline: time to close connections, deregister memory and exit.
GRACE_SECONDS = 15
# Clients reach a router for a while after it began to leave: every node hears of a Service's endpoints on its own.
QUIET_SECONDS = 3
# Group of the mounted volumes: the engine's image runs as this user.
USER_ID = 65532


def container(options: Options, args: list[str], env: dict[str, str], resources: Object) -> Object:
    """A kvasir container, without probes, that may do nothing but compute.

    A `command` would replace the image's entry point, and with it the process that hands on signals.
    """
    found: Object = {
        "name": CONTAINER,
        "image": options.engine_image,
        "args": args,
        "env": [{"name": name, "value": value} for name, value in {"KVASIR_CACHE": CACHE_PATH, **env}.items()],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    if options.defaults < ENTRYPOINT:
        found["command"] = ["kvasir"]
    return found


def probes(service: InferenceService) -> Object:
    """The probes of a container that serves."""
    return {
        "startupProbe": {
            **_probe("/health", STARTUP_PERIOD_SECONDS),
            "failureThreshold": startup_seconds(service) // STARTUP_PERIOD_SECONDS,
        },
        "readinessProbe": {**_probe("/ready", 2), "failureThreshold": 2},
        "livenessProbe": {**_probe("/health", 10), "failureThreshold": 6},
    }


def _probe(path: str, period: int) -> Object:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period, "timeoutSeconds": 5}


def pod_spec(service: InferenceService, main: Object, token: bool) -> Object:
    """A pod of one container, with the model at hand and what a restricted namespace asks for.

    `token`: whether it may ask the model hub in the user's name.
    """
    spec: Object = {
        "containers": [main],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",  # a cache of a terabyte is not walked at every start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
    }
    mount_model(service, main, spec, token)
    _common(service, main, spec)
    if name := service.spec.priority_class_name:
        spec["priorityClassName"] = name
    if secrets := service.spec.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in secrets]
    return spec


def _common(service: InferenceService, main: Object, spec: Object) -> None:
    """The spec's settings of all pods that run the engine."""
    engine = service.spec.engine
    if engine.image:
        main["image"] = engine.image
    if engine.image_pull_policy:
        main["imagePullPolicy"] = engine.image_pull_policy
    main["env"] += [{"name": each.name, "value": each.value} for each in engine.env]
    if name := engine.ca_config_map_name:
        main["env"] += [{"name": each, "value": f"{CA_PATH}/ca.crt"} for each in CA_VARIABLES]
        main["volumeMounts"].append({"name": "ca", "mountPath": CA_PATH, "readOnly": True})
        spec["volumes"].append({"name": "ca", "configMap": {"name": name}})


def serving_pod(service: InferenceService, role: Role, main: Object, options: Options) -> Object:
    """The pod of a role: as `pod_spec`, under the role's account, away from its own kind, with time to drain."""
    main |= probes(service)
    main["lifecycle"] = {"preStop": {"exec": {"command": _drain(role, options)}}}
    # A router reads the tokenizer; a worker reads the weights that a Job has loaded.
    spec = pod_spec(service, main, token=role == "router" or not preloads(service))
    spec["terminationGracePeriodSeconds"] = service.spec.drain.deadline_seconds + GRACE_SECONDS
    spread(service, role, spec)
    if options.in_cluster:
        spec["serviceAccountName"] = role_name(service, role)
    if service.spec.transfer.encryption != "Off":
        _identify(service, role, main, spec)
    return spec


def _identify(service: InferenceService, role: Role, main: Object, spec: Object) -> None:
    """Give a pod the certificate of its role. What the Secret holds is in no template: it changes under the pod."""
    main["volumeMounts"].append({"name": TLS_VOLUME, "mountPath": TLS_PATH, "readOnly": True})
    secret = {"secretName": tls_secret_name(service, role), "defaultMode": 0o440}
    spec["volumes"].append({"name": TLS_VOLUME, "secret": secret})
    if role != "router":
        main["ports"].append({"name": WORKER_PORT_NAME, "containerPort": WORKER_PORT, "protocol": "TCP"})


def _drain(role: Role, options: Options) -> list[str]:
    """The preStop hook: runs until nothing is in flight, at most to the drain deadline, which the process keeps.

    By exec: a request from elsewhere could not be told from that of anybody who reaches the port.
    """
    quiet = ["--quiet", str(QUIET_SECONDS)] if role == "router" and options.in_cluster else []
    return ["kvasir", "drain", *quiet]


def model_args(service: InferenceService) -> list[str]:
    """The flags that tell any role which model is served; what the spec leaves to the engine is left out."""
    model = service.spec.model
    args = ["--model", model_uri_in_pod(model), "--served-model-name", service.served_name]
    if model.revision:
        args += ["--revision", model.revision]
    if model.max_length:
        args += ["--max-length", str(model.max_length)]
    return args


def tls_args(service: InferenceService, role: Role) -> list[str]:
    """The flags that tell a role where its certificate is, and what workers are to encrypt."""
    encryption = service.spec.transfer.encryption or "Auto"
    if encryption == "Off":
        return []
    args = ["--tls-dir", TLS_PATH]
    if role != "router":
        args += ["--encryption", encryption.lower()]
    return args


def drain_args(service: InferenceService) -> list[str]:
    """The flags that tell any role how long it may take to leave."""
    return ["--drain-seconds", str(service.spec.drain.deadline_seconds)]
