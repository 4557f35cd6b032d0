"""Which values the fields of a pod take, by type and field: what the API's types do not say.

After Kubernetes' API reference and the rules of its pod validation, which are the same from 1.30 to 1.37 where it
is not said.
"""

import re

_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_PART = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # of an object's name, the whole of which has a bound, not its parts
SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){_PART}(\.{_PART})*")
LABEL = re.compile(_LABEL)
QUALIFIED = re.compile(rf"({_LABEL}(\.{_LABEL})*/)?[A-Za-z0-9]([-._A-Za-z0-9]{{0,61}}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
KEY = re.compile(r"(?!\.\.)(?!\.$)[-._a-zA-Z0-9]{1,253}")
# From 1.34 on any printable character but =.
ENV_NAME = re.compile(r"(?!\.\.)(?!\.$)[-._a-zA-Z][-._a-zA-Z0-9]*")
_SOME = re.compile(r"(?s).+")
_TRIMMED = re.compile(r"\S(.*\S)?")
# Inside a volume or a mount: never above it.
_BELOW = re.compile(r"(?!/)(?!(.*/)?\.\.(/|$)).+")
_NO_UP = re.compile(r"(?!(.*/)?\.\.(/|$)).+")

Where = tuple[str, str]

PATTERNS: dict[Where, tuple[re.Pattern[str], str]] = {
    **dict.fromkeys(
        [("Container", "name"), ("Volume", "name"), ("PodSpec", "hostname"), ("PodResourceClaim", "name")],
        (LABEL, "a DNS label: at most 63 lower-case letters, digits and dashes"),
    ),
    **dict.fromkeys(
        [
            ("LocalObjectReference", "name"),
            ("SecretVolumeSource", "secretName"),
            ("PersistentVolumeClaimVolumeSource", "claimName"),
            ("ConfigMapVolumeSource", "name"),
            ("PodSpec", "priorityClassName"),
            ("PodSpec", "serviceAccountName"),
            ("PodSpec", "runtimeClassName"),
            ("PodSpec", "nodeName"),
            ("PodResourceClaim", "resourceClaimName"),
            ("PodResourceClaim", "resourceClaimTemplateName"),
        ],
        (SUBDOMAIN, "an object's name: lower-case letters, digits, dashes and dots"),
    ),
    **dict.fromkeys(
        [
            ("ConfigMapKeySelector", "name"),
            ("SecretKeySelector", "name"),
            ("ConfigMapEnvSource", "name"),
            ("SecretEnvSource", "name"),
            ("VolumeMount", "name"),
            ("ResourceClaim", "name"),
            ("VolumeMount", "mountPath"),
            ("NFSVolumeSource", "server"),
            ("CSIVolumeSource", "driver"),
        ],
        (_SOME, "something"),
    ),
    **dict.fromkeys(
        [("ConfigMapKeySelector", "key"), ("SecretKeySelector", "key"), ("KeyToPath", "key")],
        (KEY, "a key: letters, digits, dashes, dots and underscores"),
    ),
    **dict.fromkeys(
        [
            ("PodAffinityTerm", "topologyKey"),
            ("TopologySpreadConstraint", "topologyKey"),
            ("NodeSelectorRequirement", "key"),
            ("LabelSelectorRequirement", "key"),
            ("PodReadinessGate", "conditionType"),
            ("PodSchedulingGate", "name"),
        ],
        (QUALIFIED, "a label's key, such as team or example.com/team"),
    ),
    ("EnvVar", "name"): (ENV_NAME, "a variable's name: letters, digits, dashes, dots, underscores, no digit first"),
    ("ContainerPort", "name"): (PORT_NAME, "a port's name: at most 15 lower-case letters, digits and dashes"),
    ("Container", "image"): (_TRIMMED, "an image's name, without spaces around it"),
    ("HostPathVolumeSource", "path"): (_NO_UP, "a path without .."),
    ("KeyToPath", "path"): (_BELOW, "a relative path without .."),
    ("VolumeMount", "subPath"): (_BELOW, "a relative path without .."),
    ("VolumeMount", "subPathExpr"): (_BELOW, "a relative path without .."),
}

VALUES: dict[Where, tuple[str, ...]] = {
    ("PodSpec", "restartPolicy"): ("Always",),  # the one that a Deployment takes
    ("PodSpec", "dnsPolicy"): ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    ("PodSpec", "preemptionPolicy"): ("PreemptLowerPriority", "Never"),
    ("Container", "imagePullPolicy"): ("Always", "IfNotPresent", "Never"),
    ("Container", "terminationMessagePolicy"): ("File", "FallbackToLogsOnError"),
    ("ContainerPort", "protocol"): ("TCP", "UDP", "SCTP"),
    ("HTTPGetAction", "scheme"): ("HTTP", "HTTPS"),
    ("VolumeMount", "mountPropagation"): ("None", "HostToContainer", "Bidirectional"),
    ("Toleration", "effect"): ("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("Toleration", "operator"): ("", "Exists", "Equal", "Lt", "Gt"),
    ("NodeSelectorRequirement", "operator"): ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    ("LabelSelectorRequirement", "operator"): ("In", "NotIn", "Exists", "DoesNotExist"),
    ("TopologySpreadConstraint", "whenUnsatisfiable"): ("DoNotSchedule", "ScheduleAnyway"),
    ("TopologySpreadConstraint", "nodeAffinityPolicy"): ("Honor", "Ignore"),
    ("TopologySpreadConstraint", "nodeTaintsPolicy"): ("Honor", "Ignore"),
    ("SeccompProfile", "type"): ("Unconfined", "RuntimeDefault", "Localhost"),
    ("AppArmorProfile", "type"): ("Unconfined", "RuntimeDefault", "Localhost"),
    ("PodSecurityContext", "fsGroupChangePolicy"): ("OnRootMismatch", "Always"),
    ("PodSecurityContext", "supplementalGroupsPolicy"): ("Merge", "Strict"),
    ("HostPathVolumeSource", "type"): (
        *("", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"),
    ),
    ("PodOS", "name"): ("linux",),
}

_ID, _PORT, _MODE, _SECONDS = (0, 2**31 - 1), (1, 65535), (0, 0o777), (0, 2**31 - 1)
RANGES: dict[Where, tuple[int, int]] = {
    ("ContainerPort", "containerPort"): _PORT,
    ("ContainerPort", "hostPort"): (0, 65535),
    ("GRPCAction", "port"): _PORT,
    **{
        ("Probe", field): _SECONDS
        for field in (
            "initialDelaySeconds",
            "timeoutSeconds",
            "periodSeconds",
            "successThreshold",
            "failureThreshold",
        )
    },
    ("Probe", "terminationGracePeriodSeconds"): (1, 2**63 - 1),
    ("SleepAction", "seconds"): (0, 2**63 - 1),
    ("PodSpec", "terminationGracePeriodSeconds"): (0, 2**63 - 1),
    ("PodSpec", "activeDeadlineSeconds"): (1, 2**31 - 1),
    ("PreferredSchedulingTerm", "weight"): (1, 100),
    ("WeightedPodAffinityTerm", "weight"): (1, 100),
    ("TopologySpreadConstraint", "maxSkew"): (1, 2**31 - 1),
    ("TopologySpreadConstraint", "minDomains"): (1, 2**31 - 1),
    **{
        (kind, field): _ID
        for kind in ("SecurityContext", "PodSecurityContext")
        for field in ("runAsUser", "runAsGroup", "fsGroup")
    },
    **{
        (f"{kind}VolumeSource", "defaultMode"): _MODE
        for kind in ("Secret", "ConfigMap", "Projected", "DownwardAPI")
    },
    ("KeyToPath", "mode"): _MODE,
}

# Of these fields one is given: exactly one, or at most one.
_HANDLERS = ("exec", "httpGet", "tcpSocket")
EXACTLY_ONE: dict[str, tuple[str, ...]] = {
    "Probe": (*_HANDLERS, "grpc"),
    "LifecycleHandler": (*_HANDLERS, "sleep"),
    "EnvVarSource": ("configMapKeyRef", "fieldRef", "fileKeyRef", "resourceFieldRef", "secretKeyRef"),
    "EnvFromSource": ("configMapRef", "secretRef"),
    "PodResourceClaim": ("resourceClaimName", "resourceClaimTemplateName"),
}
AT_MOST_ONE: dict[str, tuple[str, ...]] = {
    "EnvVar": ("value", "valueFrom"),
    "VolumeMount": ("subPath", "subPathExpr"),
}
# Of these types every field but the name is one of the things that it can be.
ONE_THING = ("Volume", "VolumeProjection")
