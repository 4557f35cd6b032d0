"""From a document to an InferenceService with its defaults, or to every reason why it is none."""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvasir_operator.kinds import API_VERSION, KIND, NAME_LENGTH, NAME_PATTERN
from kvasir_operator.schema import Invalid, Schema, problems, structural
from kvasir_operator.spec.service import InferenceService, Spec
from kvasir_operator.validate import semantic_problems


class InvalidService(ValueError):
    """An object that is no valid InferenceService. `problems` holds every reason, not only the first."""

    def __init__(self, problems: list[Invalid]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


def object_schema() -> Schema:
    """The schema of the object without its status. Of metadata, a CRD can only restrict the name."""
    return {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": NAME_LENGTH, "pattern": NAME_PATTERN}},
            },
            "spec": {**structural(Spec), "description": "What is wanted."},
        },
    }


_SCHEMA = object_schema()


def parse(document: Mapping[str, Any], default_namespace: str = "default") -> InferenceService:
    """The InferenceService that `document` describes. Raises InvalidService with every problem found."""
    found = list(_envelope_problems(document))
    if not found:
        found = list(problems(_SCHEMA["properties"]["spec"], document["spec"], "spec"))
    if found:
        raise InvalidService(found)
    metadata = document["metadata"]
    service = InferenceService(
        name=metadata["name"],
        namespace=metadata.get("namespace") or default_namespace,
        uid=metadata.get("uid", ""),
        generation=metadata.get("generation", 0),
        spec=msgspec.convert(document["spec"], Spec),
    )
    if found := list(semantic_problems(service)):
        raise InvalidService(found)
    return service


def _envelope_problems(document: Mapping[str, Any]) -> list[Invalid]:
    if not isinstance(document, Mapping):
        return [Invalid("", "must be an object")]
    found = []
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(field) != expected:
            found.append(Invalid(field, f"must be {expected}, is {document.get(field)!r}"))
    metadata = document.get("metadata")
    if not isinstance(metadata, Mapping) or "name" not in metadata:
        found.append(Invalid("metadata.name", "is required"))
    else:
        found.extend(_name_problems(metadata["name"]))
    if "spec" not in document:
        found.append(Invalid("spec", "is required"))
    found.extend(
        Invalid(field, "unknown field")
        for field in document
        if field not in ("apiVersion", "kind", "metadata", "spec", "status")
    )
    return found


def _name_problems(name: object) -> list[Invalid]:
    found = list(problems(_SCHEMA["properties"]["metadata"]["properties"]["name"], name, "metadata.name"))
    return [Invalid(p.path, f"{p.reason}: Services and Deployments are named after it") for p in found]
