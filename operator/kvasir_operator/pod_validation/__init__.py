"""PURE: the problems that an API server would find in a pod template, before it is asked.

`fields.json` says which fields there are and of what type (Kubernetes' own OpenAPI schemas; `make pod-fields`),
`tables.py` what values they take, `types.py` walks both, and the rest holds what concerns several fields.
`policy.py` judges a pod by the Pod Security Standards, at the level that the installer has set. What cannot be
known here (quotas, others' policies, names of what is to exist) is left to the server.
"""

from kvasir_operator.pod_validation.path import Path, Problem
from kvasir_operator.pod_validation.pod import pod_problems
from kvasir_operator.pod_validation.policy import RESTRICTED, UNRESTRICTED, Level, PodPolicy, policy_problems
from kvasir_operator.pod_validation.types import type_problems

__all__ = [
    "RESTRICTED",
    "UNRESTRICTED",
    "Level",
    "Path",
    "PodPolicy",
    "Problem",
    "pod_problems",
    "policy_problems",
    "type_problems",
]
