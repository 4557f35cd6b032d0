"""From a document to a valid InferenceService, or to every reason why it is none."""

from collections.abc import Mapping
from typing import Any

from kvasir_operator.admission.rendered_pods import merged_problems
from kvasir_operator.api import InferenceService, InvalidService
from kvasir_operator.api.parse import parse_fields
from kvasir_operator.pod_validation import RESTRICTED, PodPolicy


def parse(
    document: Mapping[str, Any], default_namespace: str = "default", policy: PodPolicy = RESTRICTED
) -> InferenceService:
    """The InferenceService that `document` describes, whose pods are no more than `policy` lets them be. Raises
    InvalidService with every problem found."""
    service = parse_fields(document, default_namespace)
    if found := merged_problems(service, policy):
        raise InvalidService(found)
    return service
