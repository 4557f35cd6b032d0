"""From a document to a valid InferenceService, or to every reason why it is none."""

from collections.abc import Mapping
from typing import Any

from kvasir_operator.admission.rendered_pods import merged_problems
from kvasir_operator.api import InferenceService, InvalidService
from kvasir_operator.api.parse import parse_fields


def parse(document: Mapping[str, Any], default_namespace: str = "default") -> InferenceService:
    """The InferenceService that `document` describes. Raises InvalidService with every problem found."""
    service = parse_fields(document, default_namespace)
    if found := merged_problems(service):
        raise InvalidService(found)
    return service
