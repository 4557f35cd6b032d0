"""The admission webhook: the operator's own checks, at `kubectl apply`. Pure but for `read_metadata`."""

from collections.abc import Callable, Mapping
from typing import Any

from kvasir_operator.admission.parse import parse
from kvasir_operator.api import InvalidService, Model
from kvasir_operator.api.validation import ModelMetadata, model_problems
from kvasir_operator.pod_validation import RESTRICTED, PodPolicy

# What the API server adds to a generateName, in length.
_GENERATED = "xxxxx"


def refusal(
    new: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    read_metadata: Callable[[Model], ModelMetadata | None],
    policy: PodPolicy = RESTRICTED,
) -> str | None:
    """Why an InferenceService is not to be stored, or `None`.

    A spec that is stored already is not judged again: an object that an older operator took must stay editable
    (labels, annotations), and must be able to go.
    """
    metadata = new.get("metadata", {})
    if "deletionTimestamp" in metadata or (old is not None and old.get("spec") == new.get("spec")):
        return None
    if "name" not in metadata and "generateName" in metadata:
        new = {**new, "metadata": {**metadata, "name": metadata["generateName"] + _GENERATED}}
    try:
        service = parse(new, policy=policy)
        if problems := model_problems(service, read_metadata(service.spec.model)):
            raise InvalidService(problems)
    except InvalidService as error:
        return str(error)
    return None
