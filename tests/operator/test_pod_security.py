"""Each control of the Pod Security Standards, at each level: what refuses it, by its field, and what takes it.

`OF_CONTAINERS` and `OF_PODS`: what a template says, the field that is refused, and the lowest level that takes it.
"""

from typing import Any, get_args

import pytest
from isvc_cases import document
from policy_cases import refused, templated

from kvasir_operator.admission import parse
from kvasir_operator.pod_validation import UNRESTRICTED, Level, PodPolicy, policy_problems
from kvasir_operator.render import Object, Options, render

LEVELS = get_args(Level)
CAPABILITIES_OF_BASELINE = (
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
)
OUR_SIDECAR = {
    "name": "logs",
    "image": "fluent-bit:3",
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}


def context(**fields: Any) -> Object:
    """A container's security context that is restricted but for these fields."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, **fields}


def adds(*names: str) -> Object:
    return context(capabilities={"drop": ["ALL"], "add": list(names)})


# Of a container's securityContext: what it is, the field below it, the lowest level.
OF_CONTAINERS: list[tuple[Object, str, Level]] = [
    (context(privileged=True, allowPrivilegeEscalation=True), "privileged", "privileged"),
    *((adds(name), "capabilities.add[0]", "baseline") for name in CAPABILITIES_OF_BASELINE),
    *(
        (adds("NET_BIND_SERVICE", name), "capabilities.add[1]", "privileged")
        for name in ("NET_ADMIN", "NET_RAW", "SYS_PTRACE", "IPC_LOCK", "ALL", "chown")
    ),
    *(
        ({**adds(name), "allowPrivilegeEscalation": True}, "capabilities.add[0]", "privileged")
        for name in ("SYS_ADMIN", "CAP_SYS_ADMIN")
    ),
    (context(capabilities={"drop": []}), "capabilities.drop", "baseline"),
    (context(capabilities={"drop": ["NET_RAW"]}), "capabilities.drop", "baseline"),
    (context(allowPrivilegeEscalation=True), "allowPrivilegeEscalation", "baseline"),
    (context(runAsNonRoot=False), "runAsNonRoot", "baseline"),
    (context(runAsUser=0), "runAsUser", "baseline"),
    (context(seccompProfile={"type": "Unconfined"}), "seccompProfile.type", "privileged"),
    (context(appArmorProfile={"type": "Unconfined"}), "appArmorProfile.type", "privileged"),
    (context(procMount="Unmasked"), "procMount", "privileged"),
    (context(seLinuxOptions={"type": "spc_t"}), "seLinuxOptions.type", "privileged"),
    (context(seLinuxOptions={"user": "system_u"}), "seLinuxOptions.user", "privileged"),
    (context(seLinuxOptions={"role": "system_r"}), "seLinuxOptions.role", "privileged"),
    (context(windowsOptions={"hostProcess": True}), "windowsOptions.hostProcess", "privileged"),
]
FINE_CONTEXTS = [
    adds("NET_BIND_SERVICE"),
    context(runAsUser=1000, runAsNonRoot=True, procMount="Default", privileged=False),
    context(seccompProfile={"type": "Localhost", "localhostProfile": "a.json"}),
    context(appArmorProfile={"type": "RuntimeDefault"}),
    *(
        context(seLinuxOptions={"type": kind, "level": "s0:c1"})
        for kind in ("container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    ),
]
# Of a pod's spec, the same.
OF_PODS: list[tuple[Object, str, Level]] = [
    ({"hostNetwork": True}, "hostNetwork", "privileged"),
    ({"hostPID": True}, "hostPID", "privileged"),
    ({"hostIPC": True}, "hostIPC", "privileged"),
    ({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "volumes[0].hostPath", "privileged"),
    *(
        ({"volumes": [{"name": "a", kind: source}]}, f"volumes[0].{kind}", "baseline")
        for kind, source in (
            ("nfs", {"server": "s", "path": "/"}),
            ("image", {"reference": "a:1"}),
            ("iscsi", {"targetPortal": "t", "iqn": "iqn.2001-04.com.example:a", "lun": 0}),
            ("gitRepo", {"repository": "r"}),
            ("flexVolume", {"driver": "a/b"}),
            ("rbd", {"monitors": ["m"], "image": "i"}),
            ("awsElasticBlockStore", {"volumeID": "v"}),
        )
    ),
    *(
        (
            {"securityContext": {"sysctls": [{"name": name, "value": "1"}]}},
            "securityContext.sysctls[0].name",
            UNRESTRICTED.level,
        )
        for name in ("kernel.msgmax", "net.core.somaxconn")
    ),
    ({"securityContext": {"runAsUser": 0}}, "securityContext.runAsUser", "baseline"),
    (
        {"securityContext": {"seccompProfile": {"type": "Unconfined"}}},
        "securityContext.seccompProfile.type",
        "privileged",
    ),
    (
        {"securityContext": {"appArmorProfile": {"type": "Unconfined"}}},
        "securityContext.appArmorProfile.type",
        "privileged",
    ),
    ({"securityContext": {"seLinuxOptions": {"type": "a_t"}}}, "securityContext.seLinuxOptions.type", "privileged"),
    (
        {"securityContext": {"windowsOptions": {"hostProcess": True}}},
        "securityContext.windowsOptions.hostProcess",
        "privileged",
    ),
    ({"serviceAccountName": "cluster-admin"}, "serviceAccountName", "privileged"),
    ({"serviceAccountName": "default"}, "serviceAccountName", "privileged"),
    ({"serviceAccount": "cluster-admin"}, "serviceAccount", "privileged"),
]
FINE_PODS = [
    {"securityContext": {"sysctls": [{"name": "net.ipv4.tcp_keepalive_time", "value": "1"}]}},
    {"securityContext": {"runAsUser": 1000, "runAsGroup": 0, "supplementalGroups": [5]}},
    {"serviceAccountName": "llama-decode", "serviceAccount": "llama-decode"},
    {"hostNetwork": False, "hostPID": False, "hostIPC": False},
    {"volumes": [{"name": "a", "emptyDir": {"medium": "HugePages"}}]},
    {"volumes": [{"name": "a", "csi": {"driver": "d"}}, {"name": "b", "configMap": {"name": "c"}}]},
    {
        "volumes": [
            {
                "name": "a",
                "projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "vault"}}]},
            }
        ]
    },
]
# Of a container, outside its securityContext.
OF_HANDLERS: list[tuple[Object, str]] = [
    ({"ports": [{"containerPort": 9, "hostPort": 9}]}, "ports[0].hostPort"),
    *(
        ({kind: {handler: {"port": 80, "host": "169.254.169.254"}}}, f"{kind}.{handler}.host")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        for handler in ("httpGet", "tcpSocket")
    ),
    *(
        ({"lifecycle": {kind: {handler: {"port": 80, "host": "10.0.0.1"}}}}, f"lifecycle.{kind}.{handler}.host")
        for kind in ("postStart", "preStop")
        for handler in ("httpGet", "tcpSocket")
    ),
]


def takes(level: Level, lowest: Level) -> bool:
    return LEVELS.index(level) >= LEVELS.index(lowest)


def check(spec: Object, path: str, lowest: Level) -> None:
    """Refused by this field alone, at each level that is too low, with the values that would take it."""
    for level in LEVELS:
        found = refused(spec, PodPolicy(level))
        if takes(level, lowest):
            assert not found
            continue
        assert path in found
        assert f"the template policy is {level}, more takes" in found[path]
        assert "the chart's templatePolicy" in found[path]


@pytest.mark.parametrize(("said", "field", "lowest"), OF_CONTAINERS)
def test_a_container_is_no_more_than_the_level(said: Object, field: str, lowest: Level) -> None:
    where = "spec.decode.template.spec"
    ordinary = {"containers": [{"name": "logs", "image": "i:1", "securityContext": said}]}
    check(templated(ordinary), f"{where}.containers[0].securityContext.{field}", lowest)
    init = {"initContainers": [{"name": "warm", "image": "i:1", "securityContext": said}]}
    check(templated(init), f"{where}.initContainers[0].securityContext.{field}", lowest)


def test_the_workers_own_container_is_judged_as_merged() -> None:
    """What the template does not say is Kvasir's, which is restricted."""
    for said, field, lowest in OF_CONTAINERS:
        mine = {"containers": [{"name": "kvasir", "securityContext": said}]}
        check(templated(mine), f"spec.decode.template.spec.containers[0].securityContext.{field}", lowest)
    partly = {"containers": [{"name": "kvasir", "securityContext": {"runAsUser": 7}}]}
    assert not refused(templated(partly), PodPolicy())


@pytest.mark.parametrize("kind", ["containers", "initContainers", "ephemeralContainers"])
def test_containers_of_all_kinds_are_judged_alike(kind: str) -> None:
    """An API server refuses ephemeral containers in a template; the policy does not count on that."""
    worker = document()
    (pod, *_) = [
        o["spec"]["template"]
        for o in render(parse(worker), Options())
        if o["kind"] == "Deployment" and "decode" in o["metadata"]["name"]
    ]
    others = list(pod["spec"].get(kind, []))
    for said, field, lowest in OF_CONTAINERS:
        changed = {**pod, "spec": {**pod["spec"], kind: [*others, {"name": "debug", "securityContext": said}]}}
        for level in LEVELS:
            found = {
                ".".join(str(step) for step in each.path)
                for each in policy_problems(changed, PodPolicy(level), "llama-decode")
            }
            path = f"spec.{kind}.{len(others)}.securityContext.{field}".replace("[", ".").replace("]", "")
            assert (path in found) is not takes(level, lowest)


@pytest.mark.parametrize("said", FINE_CONTEXTS)
def test_what_a_restricted_container_may_say(said: Object) -> None:
    sidecar = {"name": "logs", "image": "i:1", "securityContext": said}
    assert not refused(
        templated({"containers": [sidecar], "initContainers": [{**sidecar, "name": "a"}]}), PodPolicy()
    )


def test_a_sidecar_that_says_nothing_of_its_security_is_not_restricted() -> None:
    plain = {"containers": [{"name": "logs", "image": "fluent-bit:3"}]}
    where = "spec.decode.template.spec.containers[0].securityContext"
    assert set(refused(templated(plain), PodPolicy())) == {
        f"{where}.allowPrivilegeEscalation",
        f"{where}.capabilities.drop",
    }
    assert not refused(templated(plain), PodPolicy("baseline"))
    assert not refused(templated({"containers": [OUR_SIDECAR]}), PodPolicy())


@pytest.mark.parametrize(("said", "field", "lowest"), OF_PODS)
def test_a_pod_is_no_more_than_the_level(said: Object, field: str, lowest: Level) -> None:
    check(templated(said), f"spec.decode.template.spec.{field}", lowest)


@pytest.mark.parametrize("said", FINE_PODS)
def test_what_a_restricted_pod_may_say(said: Object) -> None:
    assert not refused(templated(said), PodPolicy())


@pytest.mark.parametrize(("said", "field"), OF_HANDLERS)
def test_a_container_reaches_nothing_by_its_node(said: Object, field: str) -> None:
    mine = {"containers": [{**OUR_SIDECAR, **said}]}
    path = f"spec.decode.template.spec.containers[0].{field}"
    found = refused(templated(mine), PodPolicy("baseline"))
    assert "must be absent" in found[path]
    assert path not in refused(templated(mine), UNRESTRICTED)
    native = {"initContainers": [{**OUR_SIDECAR, "restartPolicy": "Always", **said}]}
    assert f"spec.decode.template.spec.initContainers[0].{field}" in refused(
        templated(native), PodPolicy("baseline")
    )


@pytest.mark.parametrize("value", ["unconfined", "other"])
def test_apparmor_is_not_turned_off_by_an_annotation(value: str) -> None:
    key = "container.apparmor.security.beta.kubernetes.io/kvasir"
    where = f"spec.decode.template.metadata.annotations[{key}]"
    check(templated({}, annotations={key: value}), where, "privileged")
    for fine in ("runtime/default", "localhost/profile"):
        assert not refused(templated({}, annotations={key: fine}), PodPolicy())


def test_a_pod_that_may_run_as_root_is_refused_where_its_containers_may() -> None:
    pod = {"runAsNonRoot": False}
    said: Object = {"securityContext": pod, "containers": [{"name": "kvasir", "securityContext": context()}]}
    found = refused(templated(said), PodPolicy())
    assert set(found) == {"spec.decode.template.spec.containers[0].securityContext.runAsNonRoot"}
    mine = {"name": "kvasir", "securityContext": context(runAsNonRoot=True)}
    assert not refused(templated({**said, "containers": [mine]}), PodPolicy())
