"""What the API server knows Kvasir's resources by."""

GROUP = "serving.kvasir.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"
ROLE_KIND = "InferenceRole"
ROLE_PLURAL = "inferenceroles"

# The longest derived name is `NAME-prefill-REVISION`; derived names stay DNS labels (RFC 1035), as Services must.
NAME_LENGTH = 63 - len("-prefill-") - 8
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
