"""The InferenceService as types: its defaults and its checks. The CRD is generated from these (`crd.py`).

What a field means stands in its description, which `kubectl explain` shows. A default stands on the field alone.
Checks that a schema cannot express are in `validation.py`.
"""

from kvasir_operator.api.engine import Engine
from kvasir_operator.api.kinds import (
    API_VERSION,
    GROUP,
    KIND,
    NAME_PATTERN,
    PLURAL,
    ROLE_KIND,
    ROLE_PLURAL,
    SET_API_VERSION,
    SET_KIND,
    SET_PLURAL,
    VERSION,
)
from kvasir_operator.api.model import Model
from kvasir_operator.api.parse import InvalidService, object_schema
from kvasir_operator.api.rollout import Rollout
from kvasir_operator.api.router import Expose
from kvasir_operator.api.service import WORKER_ROLES, InferenceService, Spec, WorkerRole
from kvasir_operator.api.workers import Transfer, Workers

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "NAME_PATTERN",
    "PLURAL",
    "ROLE_KIND",
    "ROLE_PLURAL",
    "SET_API_VERSION",
    "SET_KIND",
    "SET_PLURAL",
    "VERSION",
    "WORKER_ROLES",
    "Engine",
    "Expose",
    "InferenceService",
    "InvalidService",
    "Model",
    "Rollout",
    "Spec",
    "Transfer",
    "WorkerRole",
    "Workers",
    "object_schema",
]
