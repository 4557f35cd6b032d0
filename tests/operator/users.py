"""InferenceServices as users write them: what each renders to is taken by an API server, or it is refused by field.

`TAKEN`: name and spec. `REFUSED`: name, spec, the field's path, and a part of the reason.
"""

from typing import Any

Spec = dict[str, Any]
GPU, MIG, HCA = "nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "rdma/hca"


def pod(role: str = "decode", *, labels: Any = None, annotations: Any = None, **spec: Any) -> Spec:
    """A spec whose role has a template with this pod spec."""
    metadata = {k: v for k, v in (("labels", labels), ("annotations", annotations)) if v is not None}
    return {role: {"template": {**({"metadata": metadata} if metadata else {}), "spec": spec}}}


def main(role: str = "decode", **fields: Any) -> Spec:
    """A spec whose template changes the worker's container."""
    return pod(role, containers=[{"name": "kvasir", **fields}])


def asks(role: str = "decode", *, more: Any = None, **kinds: Any) -> Spec:
    """A spec whose role asks for resources."""
    return {role: {"resources": kinds, **(more or {})}}


def probe(**fields: Any) -> Spec:
    return main(readinessProbe=fields)


def loaded(**preload: Any) -> Spec:
    """A spec whose model a Job loads."""
    return {"model": {"uri": "hf://org/m", "cache": {"claimName": "models", "preload": preload}}}


R = "spec.router.template"
J = "spec.model.cache.preload"
SIDECAR = {"name": "logs", "image": "fluent-bit:3"}
T = "spec.decode.template"
C = f"{T}.spec.containers[0]"

TAKEN: list[tuple[str, Spec]] = [
    ("smallest", {}),
    ("cpu", {"prefill": {"device": "cpu"}, "decode": {"device": "cpu"}}),
    (
        "extra flags",
        {role: {"extraArgs": ["--page-size", "32", "--enforce-eager"]} for role in ("prefill", "decode")},
    ),
    ("without certificates", {"transfer": {"encryption": "Off"}}),
    ("nothing leaves the node in the clear", {"transfer": {"encryption": "Required", "fabric": "shm"}}),
    ("a port of the worker again", main(ports=[{"name": "worker", "containerPort": 8443}])),
    (
        "another volume below /etc/kvasir",
        pod(
            volumes=[{"name": "notes", "emptyDir": {}}],
            containers=[
                {"name": "kvasir", "volumeMounts": [{"name": "notes", "mountPath": "/etc/kvasir/tls-notes"}]}
            ],
        ),
    ),
    ("a flag as a variable", main(env=[{"name": "KVASIR_MAX_RUNNING", "value": "8"}])),
    ("a router's flag as a variable", main("router", env=[{"name": "KVASIR_REMOTE_THRESHOLD", "value": "8"}])),
    ("a sidecar's own variable", pod(containers=[{**SIDECAR, "env": [{"name": "KVASIR_NOTE", "value": "1"}]}])),
    ("settings of the engine", {"engine": {"kvCacheMemory": "40Gi", "maxRunning": 256, "overlap": "on"}}),
    ("settings of a role", {"decode": {"engine": {"maxRunning": 512, "extraArgs": ["--check-pages"]}}}),
    ("a router's limits below ours", {"router": {"resources": {"limits": {"cpu": "500m", "memory": "512Mi"}}}}),
    ("a router's request above our limit", {"router": {"resources": {"requests": {"memory": "100Gi"}}}}),
    (
        "a router's claim",
        {
            "router": {
                "resources": {"claims": [{"name": "nic"}]},
                "template": {"spec": {"resourceClaims": [{"name": "nic", "resourceClaimName": "nic"}]}},
            }
        },
    ),
    ("a request above our limit", asks(requests={"memory": "900Gi"})),
    ("a model's size", {"model": {"uri": "hf://org/m", "size": "141107412992"}}),
    (
        "a kept image",
        {"engine": {"image": "r.example/k@sha256:" + "0a" * 32, "imagePolicy": "FollowOperator"}},
    ),
    (
        "a Job of its own kind",
        loaded(
            resources={"requests": {"cpu": "4"}, "limits": {"memory": "1Gi", "ephemeral-storage": "10Gi"}},
            template={
                "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
                "spec": {
                    "nodeSelector": {"pool": "cpu"},
                    "tolerations": [{"key": "cpu", "operator": "Exists"}],
                    "containers": [{"name": "kvasir", "env": [{"name": "HTTPS_PROXY", "value": "http://p:1"}]}],
                },
            },
        ),
    ),
    *(
        (
            f"a gang of {provider}",
            {
                "decode": {"nodes": 2, "tensorParallel": 16},
                "scheduling": {"gang": {"provider": provider, "queue": "team-a"}},
            },
        )
        for provider in ("Kueue", "KAI", "Volcano")
    ),
    ("longer grace", pod(terminationGracePeriodSeconds=3600)),
    ("sidecar", pod(containers=[SIDECAR])),
    ("init container", pod(initContainers=[{"name": "warm", "image": "busybox", "command": ["true"]}])),
    (
        "native sidecar",
        pod(initContainers=[{**SIDECAR, "restartPolicy": "Always", "startupProbe": {"exec": {"command": ["x"]}}}]),
    ),
    (
        "proxy",
        main(env=[{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "NO_PROXY", "value": ".svc"}]),
    ),
    ("variable of a secret", main(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}])),
    ("variable of a field", main(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}])),
    (
        "ca bundle",
        pod(
            volumes=[{"name": "ca", "configMap": {"name": "ca"}}],
            containers=[
                {
                    "name": "kvasir",
                    "volumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/certs", "readOnly": True}],
                }
            ],
        ),
    ),
    ("model of a claim", {"model": {"uri": "pvc://models/llama-3"}}),
    ("cache of a claim", {"model": {"uri": "hf://org/m", "cache": {"claimName": "models"}}}),
    ("cache of a node", {"model": {"uri": "hf://org/m", "cache": {"hostPath": "/var/cache/kvasir"}}}),
    ("gated model", {"model": {"uri": "hf://org/m", "tokenSecretName": "hub"}}),
    ("mig", asks(limits={MIG: 1})),
    ("mig of requests", asks(requests={MIG: 1})),
    ("mig of a template", main(resources={"limits": {MIG: 1}})),
    ("shared gpu", asks(limits={"nvidia.com/gpu.shared": 1})),
    ("claim", {"decode": {"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h100"}]}}),
    (
        "claim and no gpu",
        asks(limits={GPU: 0}, more={"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h100"}]}),
    ),
    (
        "claim for a network card",
        asks(limits={GPU: 1}, more={"resourceClaims": [{"name": "nic", "resourceClaimName": "nic"}]}),
    ),
    (
        "claim of a template",
        pod(
            resourceClaims=[{"name": "gpu", "resourceClaimTemplateName": "h100"}],
            containers=[{"name": "kvasir", "resources": {"claims": [{"name": "gpu"}], "limits": {GPU: 0}}}],
        ),
    ),
    (
        "one request of a claim",
        asks(
            claims=[{"name": "gpu", "request": "big"}],
            more={"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h100"}]},
        ),
    ),
    ("long name", {"metadata.name": "a" * 40}),
    ("zero replicas", {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "router": {"replicas": 0}}),
    *(
        (f"rdma by {name}", {"transfer": {"fabric": "rdma", "rdmaResource": name}})
        for name in (
            HCA,
            "rdma/rdma_shared_device_a",
            "nvidia.com/hostdev",
            "nvidia.com/sriov_rdma_vf",
            "openshift.io/mlnxnics",
        )
    ),
    (
        "fewer rdma devices",
        {**asks(limits={HCA: 1}, more={"tensorParallel": 8}), "transfer": {"rdmaResource": HCA}},
    ),
    (
        "fewer rdma devices by request",
        {**asks(requests={HCA: 1}, more={"tensorParallel": 8}), "transfer": {"rdmaResource": HCA}},
    ),
    ("memory limit below ours", asks(limits={"memory": "8Gi"})),
    ("cpu limit below ours", asks(limits={"cpu": "500m", "memory": "64Gi"})),
    ("limits of a template", main(resources={"limits": {"memory": "8Gi", "cpu": 0.5}})),
    ("ephemeral storage", asks(limits={"ephemeral-storage": "20Gi"})),
    ("huge pages", asks(requests={"hugepages-2Mi": "1Gi"}, limits={"hugepages-2Mi": "1Gi"})),
    ("host network", pod(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet")),
    ("priority class", {"priorityClassName": "serving-high"}),
    ("probe by exec", probe(exec={"command": ["true"]})),
    ("probe by tcp", probe(tcpSocket={"port": 8000})),
    ("probe of other times", probe(periodSeconds=30)),
    ("hook of its own", main(lifecycle={"preStop": {"sleep": {"seconds": 5}}})),
    (
        "tolerations",
        pod(
            tolerations=[{"key": "dedicated", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 9}]
        ),
    ),
    ("node selector", pod(nodeSelector={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"})),
    ("no affinity", pod(affinity={"nodeAffinity": {}})),
    ("mesh annotations", pod(annotations={"sidecar.istio.io/inject": "false"}, labels={"team": "a"})),
    (
        "dns ports",
        pod(containers=[{**SIDECAR, "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}]}]),
    ),
    ("privileged", main(securityContext={"privileged": True, "allowPrivilegeEscalation": True})),
    ("own scheduler and runtime", pod(schedulerName="kai-scheduler", runtimeClassName="nvidia")),
    ("ingress", {"router": {"expose": {"type": "Ingress", "host": "llm.example.com", "tlsSecretName": "tls"}}}),
    (
        "inference pool",
        {
            "router": {
                "replicas": 2,
                "expose": {
                    "type": "InferencePool",
                    "className": "infra/gateway",
                    "host": "llm.example",
                    "endpointPicker": {"name": "llama-epp", "failureMode": "FailClose"},
                },
            }
        },
    ),
    ("route", {"router": {"expose": {"type": "HTTPRoute", "className": "infra/gateway"}}}),
    ("two nodes", {"decode": {"tensorParallel": 16, "nodes": 2}}),
    (
        "two nodes, own limits",
        {"decode": {"tensorParallel": 16, "nodes": 2, "resources": {"limits": {"memory": "64Gi"}}}},
    ),
    ("shared memory", {"transfer": {"fabric": "shm"}}),
    ("external scaling", {"scaling": {"mode": "External"}}),
]

REFUSED: list[tuple[str, Spec, str, str]] = [
    (
        "a typo in a router's template",
        {"router": {"template": {"spec": {"nodeSelectr": {}}}}},
        f"{R}.spec.nodeSelectr",
        "unknown field",
    ),
    (
        "a router's request above its limit",
        {"router": {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}},
        "spec.router.resources.requests.cpu",
        "limit",
    ),
    (
        "a router's claim of which the pod has none",
        {"router": {"resources": {"claims": [{"name": "nic"}]}}},
        "spec.router.resources.claims[0].name",
        "nic",
    ),
    (
        "a router's args",
        main("router", args=["router"]),
        f"{R}.spec.containers[0].args",
        "the operator's own",
    ),
    *(
        (
            f"a router's {name} as a variable",
            main("router", env=[{"name": name, "value": "1"}]),
            f"{R}.spec.containers[0].env[0]",
            why,
        )
        for name, why in (
            ("KVASIR_PORT", "is the same in every pod"),
            ("KVASIR_API_KEYS_FILE", "spec.router.auth.secretName"),
            ("KVASIR_HOLD_SECONDS", "scaleToZero.holdSeconds"),
            ("KVASIR_WATCH_PODS", "how workers are found"),
        )
    ),
    (
        "a router that may not drain",
        pod("router", terminationGracePeriodSeconds=5),
        f"{R}.spec.terminationGracePeriodSeconds",
        "spec.drain.deadlineSeconds",
    ),
    (
        "a Job that is restarted",
        loaded(template={"spec": {"restartPolicy": "Never"}}),
        f"{J}.template.spec.restartPolicy",
        "operator's own",
    ),
    (
        "a typo in a Job's template",
        loaded(template={"spec": {"volums": []}}),
        f"{J}.template.spec.volums",
        "unknown field",
    ),
    (
        "a Job's command",
        loaded(template={"spec": {"containers": [{"name": "kvasir", "command": ["sh"]}]}}),
        f"{J}.template.spec.containers[0].command",
        "the operator's own",
    ),
    (
        "a Job's cache as a variable",
        loaded(template={"spec": {"containers": [{"name": "kvasir", "env": [{"name": "KVASIR_CACHE"}]}]}}),
        f"{J}.template.spec.containers[0].env[0]",
        "use spec.model.cache",
    ),
    (
        "half a byte for a Job",
        loaded(resources={"limits": {"memory": "400m"}}),
        f"{J}.resources.limits.memory",
        "whole bytes",
    ),
    (
        "a Job that is none",
        {"model": {"uri": "hf://org/m", "cache": {"preload": {"resources": {"limits": {"cpu": 1}}}}}},
        J,
        "without cache.claimName",
    ),
    (
        "encryption over tcp",
        {"transfer": {"encryption": "Required", "fabric": "tcp"}},
        "spec.transfer.encryption",
        "over tcp KV is not encrypted",
    ),
    (
        "encryption over rdma",
        {"transfer": {"encryption": "Required", "fabric": "rdma", "rdmaResource": HCA}},
        "spec.transfer.encryption",
        "over rdma KV is not encrypted",
    ),
    (
        "encryption over whatever there is",
        {"transfer": {"encryption": "Required"}},
        "spec.transfer.encryption",
        "over auto KV is not encrypted",
    ),
    (
        "other certificates",
        {"decode": {"extraArgs": ["--tls-dir=/tmp"]}},
        "spec.decode.extraArgs[0]",
        "spec.transfer.encryption",
    ),
    (
        "another worker port",
        main(env=[{"name": "KVASIR_WORKER_PORT", "value": "9443"}]),
        f"{C}.env[0]",
        "is the same in every pod",
    ),
    (
        "encryption as a variable",
        main(env=[{"name": "KVASIR_ENCRYPTION", "value": "off"}]),
        f"{C}.env[0]",
        "spec.transfer.encryption",
    ),
    (
        "a volume over the certificates",
        pod(volumes=[{"name": "tls", "emptyDir": {}}]),
        f"{T}.spec.volumes[0].name",
        "Kvasir's own volume",
    ),
    (
        "a mount over the certificates",
        pod(
            volumes=[{"name": "mine", "emptyDir": {}}],
            containers=[{"name": "kvasir", "volumeMounts": [{"name": "mine", "mountPath": "/etc/kvasir/tls/"}]}],
        ),
        f"{C}.volumeMounts[0].mountPath",
        "the pod's certificate",
    ),
    (
        "a router's certificates",
        pod(
            "router",
            volumes=[{"name": "mine", "emptyDir": {}}],
            containers=[{"name": "kvasir", "volumeMounts": [{"name": "mine", "mountPath": "/etc/kvasir/tls"}]}],
        ),
        "spec.router.template.spec.containers[0].volumeMounts[0].mountPath",
        "the pod's certificate",
    ),
    (
        "the worker port elsewhere",
        main(ports=[{"name": "worker", "containerPort": 9000}]),
        f"{C}.ports[0].containerPort",
        "is the same in every pod",
    ),
    (
        "the http port elsewhere",
        main(ports=[{"name": "http", "containerPort": 9000}]),
        f"{C}.ports[0].containerPort",
        "is the same in every pod",
    ),
    (
        "a port of its own",
        main(env=[{"name": "KVASIR_PORT", "value": "9000"}]),
        f"{C}.env[0]",
        "KVASIR_PORT is the same",
    ),
    (
        "a cache of its own",
        main(env=[{"name": "KVASIR_CACHE", "value": "/x"}]),
        f"{C}.env[0]",
        "use spec.model.cache",
    ),
    (
        "a role of its own",
        main(env=[{"name": "KVASIR_ROLE", "value": "both"}]),
        f"{C}.env[0]",
        "spec.prefill and spec.decode",
    ),
    (
        "a size of its own",
        main(env=[{"name": "KVASIR_TENSOR_PARALLEL", "value": "2"}]),
        f"{C}.env[0]",
        "use spec.decode.tensorParallel",
    ),
    (
        "a variable that nothing reads",
        main(env=[{"name": "A", "value": "1"}, {"name": "KVASIR_KV_CACHE_MEMROY", "value": "2Gi"}]),
        f"{C}.env[1].name",
        "did you mean KVASIR_KV_CACHE_MEMORY?",
    ),
    (
        "a router's variable of a worker",
        main(env=[{"name": "KVASIR_HOLD_SECONDS", "value": "2"}]),
        f"{C}.env[0].name",
        "KVASIR_HOLD_SECONDS is no variable",
    ),
    (
        "a variable that no router reads",
        main("router", env=[{"name": "KVASIR_REMOTE_TRESHOLD", "value": "2"}]),
        "spec.router.template.spec.containers[0].env[0].name",
        "did you mean KVASIR_REMOTE_THRESHOLD?",
    ),
    ("args", main(args=["worker"]), f"{C}.args", "spec.decode.engine.extraArgs"),
    ("command", main(command=["sh"]), f"{C}.command", "the operator's own"),
    (
        "port as an extra flag",
        {"decode": {"extraArgs": ["--port", "9000"]}},
        "spec.decode.extraArgs[0]",
        "--port is the same",
    ),
    (
        "role as an extra flag",
        {"decode": {"extraArgs": ["--page-size", "32", "--role=both"]}},
        "spec.decode.extraArgs[2]",
        "spec.prefill and spec.decode",
    ),
    (
        "grace below the drain",
        pod(terminationGracePeriodSeconds=30),
        f"{T}.spec.terminationGracePeriodSeconds",
        "spec.drain.deadlineSeconds",
    ),
    ("typo of nodeSelector", pod(nodeSelectr={"a": "b"}), f"{T}.spec.nodeSelectr", "unknown field"),
    ("typo within a container", main(imagePullPolcy="Always"), f"{C}.imagePullPolcy", "unknown field"),
    ("typo of a container's name", pod(containers=[{"name": "kvasr", "env": []}]), f"{C}.image", "is required"),
    (
        "two handlers",
        probe(exec={"command": ["x"]}, tcpSocket={"port": 1}),
        f"{C}.readinessProbe.tcpSocket",
        "exec is there too",
    ),
    (
        "sidecar's probe without handler",
        pod(containers=[{**SIDECAR, "livenessProbe": {"periodSeconds": 1}}]),
        f"{C}.livenessProbe",
        "needs one of",
    ),
    ("number as a variable", main(env=[{"name": "A", "value": 1}]), f"{C}.env[0].value", "must be a string"),
    (
        "boolean as a variable",
        main(env=[{"name": "B", "value": "x"}, {"name": "A", "value": True}]),
        f"{C}.env[1].value",
        "must be a string",
    ),
    (
        "value twice",
        main(env=[{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]),
        f"{C}.env[0].valueFrom",
        "value is there too",
    ),
    (
        "field that is none",
        main(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}]),
        f"{C}.env[0].valueFrom.fieldRef.fieldPath",
        "cannot be had",
    ),
    ("bad variable's name", main(env=[{"name": "1A", "value": "x"}]), f"{C}.env[0].name", "a variable's name"),
    (
        "variable twice",
        main(env=[{"name": "A", "value": "x"}, {"name": "A", "value": "y"}]),
        f"{C}.env[1]",
        "there twice",
    ),
    (
        "mount without volume",
        main(volumeMounts=[{"name": "ca", "mountPath": "/ca"}]),
        f"{C}.volumeMounts[0].name",
        "no volume is called",
    ),
    ("volume without source", pod(volumes=[{"name": "ca"}]), f"{T}.spec.volumes[0]", "needs one of"),
    (
        "volume of two sources",
        pod(volumes=[{"name": "ca", "emptyDir": {}, "secret": {"secretName": "s"}}]),
        f"{T}.spec.volumes[0].secret",
        "emptyDir is there too",
    ),
    ("sidecar without image", pod(containers=[{"name": "logs"}]), f"{C}.image", "is required"),
    (
        "port twice",
        pod(containers=[{**SIDECAR, "ports": [{"containerPort": 1}, {"containerPort": 1}]}]),
        f"{C}.ports[1]",
        "there twice",
    ),
    ("port out of range", main(ports=[{"containerPort": 70000}]), f"{C}.ports[0].containerPort", "from 1 to 65535"),
    (
        "port's long name",
        main(ports=[{"containerPort": 9000, "name": "a-name-that-is-long"}]),
        f"{C}.ports[0].name",
        "a port's name",
    ),
    (
        "renamed port of ours",
        main(ports=[{"containerPort": 8000, "name": "web"}]),
        C,
        "no port of the container is called 'http'",
    ),
    ("half a device", asks(limits={HCA: "500m"}), f"spec.decode.resources.limits[{HCA}]", "whole devices"),
    ("milli bytes", asks(limits={"memory": "400m"}), "spec.decode.resources.limits.memory", "whole bytes"),
    (
        "milli bytes of a template",
        main(resources={"requests": {"memory": "400m"}}),
        f"{C}.resources.requests.memory",
        "whole bytes",
    ),
    ("no quantity", asks(limits={"memory": "8 GB"}), "spec.decode.resources.limits.memory", "must be a quantity"),
    (
        "no quantity in a template",
        main(resources={"limits": {"memory": "8GB"}}),
        f"{C}.resources.limits.memory",
        "must be a quantity",
    ),
    ("no resource", asks(limits={"gpu": 1}), "spec.decode.resources.limits.gpu", "no resource"),
    (
        "request over limit",
        asks(requests={"memory": "9Gi"}, limits={"memory": "8Gi"}),
        "spec.decode.resources.requests.memory",
        "more than the limit",
    ),
    (
        "request over limit of a sidecar",
        pod(containers=[{**SIDECAR, "resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}}]),
        f"{C}.resources.requests.cpu",
        "more than the limit",
    ),
    (
        "request of a device without limit",
        pod(containers=[{**SIDECAR, "resources": {"requests": {HCA: 1}}}]),
        f"{C}.resources.limits[{HCA}]",
        "must be there",
    ),
    (
        "devices that differ",
        asks(requests={HCA: 1}, limits={HCA: 2}),
        f"spec.decode.resources.requests[{HCA}]",
        "must equal the limit",
    ),
    (
        "gpu of a cpu role",
        asks(limits={MIG: 1}, more={"device": "cpu"}),
        f"spec.decode.resources.limits[{MIG}]",
        "asks for no GPU",
    ),
    ("no gpu at all", asks(limits={GPU: 0}), f"spec.decode.resources.limits[{GPU}]", "must equal tensorParallel"),
    (
        "too few slices",
        asks(limits={MIG: 1}, more={"tensorParallel": 2}),
        f"spec.decode.resources.limits[{MIG}]",
        "must equal tensorParallel",
    ),
    (
        "unknown claim",
        asks(claims=[{"name": "gpu"}]),
        "spec.decode.resources.claims[0].name",
        "no entry of the pod's resourceClaims",
    ),
    (
        "claim of nothing",
        {"decode": {"resourceClaims": [{"name": "gpu"}]}},
        "spec.decode.resourceClaims[0]",
        "needs one of",
    ),
    (
        "claim twice",
        {
            "decode": {
                "resourceClaims": [{"name": "g", "resourceClaimName": "a"}, {"name": "g", "resourceClaimName": "b"}]
            }
        },
        "spec.decode.resourceClaims[1]",
        "there twice",
    ),
    (
        "claim that nobody uses",
        pod(resourceClaims=[{"name": "gpu", "resourceClaimName": "a"}]),
        f"{T}.spec.resourceClaims[0]",
        "no container has it",
    ),
    ("bad label", pod(labels={"team": "a b"}), f"{T}.metadata.labels.team", "no label's value"),
    ("bad label's key", pod(labels={"a/b/c": "d"}), f"{T}.metadata.labels[a/b/c]", "no key"),
    ("bad annotation's key", pod(annotations={"a b": "c"}), f"{T}.metadata.annotations[a b]", "no key"),
    ("number as a label", pod(labels={"version": 1}), f"{T}.metadata.labels.version", "must be a string"),
    ("number in a selector", pod(nodeSelector={"gpu": True}), f"{T}.spec.nodeSelector.gpu", "must be a string"),
    (
        "toleration without key",
        pod(tolerations=[{"value": "a"}]),
        f"{T}.spec.tolerations[0].operator",
        "must be Exists",
    ),
    (
        "effect that is none",
        pod(tolerations=[{"key": "a", "operator": "Exists", "effect": "NoRun"}]),
        f"{T}.spec.tolerations[0].effect",
        "must be one of",
    ),
    ("restart policy", pod(restartPolicy="OnFailure"), f"{T}.spec.restartPolicy", "must be Always"),
    (
        "privileged without escalation",
        main(securityContext={"privileged": True}),
        f"{C}.securityContext.privileged",
        "allowPrivilegeEscalation",
    ),
    ("list as a string", pod(containers=[{**SIDECAR, "command": "sh"}]), f"{C}.command", "must be a list"),
    (
        "seconds as a string",
        pod(terminationGracePeriodSeconds="30"),
        f"{T}.spec.terminationGracePeriodSeconds",
        "must be an integer",
    ),
    (
        "container's name in upper case",
        pod(containers=[{"name": "Logs", "image": "a"}]),
        f"{C}.name",
        "a DNS label",
    ),
    (
        "init container's name taken",
        pod(initContainers=[{"name": "kvasir", "image": "a"}]),
        f"{T}.spec.initContainers[0].name",
        "another container's name",
    ),
    ("image of spaces", main(image=" a"), f"{C}.image", "without spaces"),
    (
        "pull secret twice",
        {"imagePullSecrets": [{"name": "a"}, {"name": "a"}]},
        "spec.imagePullSecrets[1]",
        "there twice",
    ),
    (
        "name of a secret",
        {"router": {"auth": {"secretName": "a..b"}}},
        "spec.router.auth.secretName",
        "does not match",
    ),
    ("long service's name", {"metadata.name": "a" * 60}, "metadata.name", "at most"),
    (
        "a follower's port",
        {
            "decode": {
                "tensorParallel": 2,
                "nodes": 2,
                "template": {
                    "spec": {"containers": [{"name": "kvasir", "readinessProbe": {"httpGet": {"port": "http"}}}]}
                },
            }
        },
        f"{C}.readinessProbe.httpGet.port",
        "no port of the container",
    ),
    (
        "node affinity without terms",
        pod(
            affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
        ),
        f"{T}.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms",
        "at least one",
    ),
    ("null", pod(nodeSelector=None), f"{T}.spec.nodeSelector", "null"),
    (
        "a mount above its volume",
        main(volumeMounts=[{"name": "tmp", "mountPath": "/x", "subPath": "../a"}]),
        f"{C}.volumeMounts[0].subPath",
        "relative path",
    ),
    (
        "two containers at one port of the node",
        pod(hostNetwork=True, containers=[{**SIDECAR, "ports": [{"containerPort": 8000}]}]),
        f"{C}.ports[0].hostPort",
        "another container's already",
    ),
]
