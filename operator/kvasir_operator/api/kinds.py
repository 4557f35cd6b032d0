"""What the API server knows Kvasir's resources by."""

GROUP = "serving.kvasir.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"
ROLE_KIND = "InferenceRole"
ROLE_PLURAL = "inferenceroles"

# On every object: which operator made it, as its namespace and the name of its Lease.
OPERATOR_ANNOTATION = f"{GROUP}/operator"

# Of LeaderWorkerSet (sigs.k8s.io/lws), which may be installed or not.
SET_API_VERSION = "leaderworkerset.x-k8s.io/v1"
SET_KIND = "LeaderWorkerSet"
SET_PLURAL = "leaderworkersets"

# The longest derived name is `NAME-prefill-REVISION`; derived names stay DNS labels (RFC 1035), as Services must.
NAME_LENGTH = 63 - len("-prefill-") - 8
# Where workers are groups: a StatefulSet's name and 11 more characters are the value of a label, of at most 63; and
# the StatefulSet of a group's followers is `NAME-prefill-REVISION-NUMBER-0`, with numbers up to 9999.
GROUPED_NAME_LENGTH = NAME_LENGTH - 11 - len("-9999") - len("-0")
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
# The container of Kvasir's own in each pod.
CONTAINER = "kvasir"
