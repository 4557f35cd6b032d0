"""From a document to an InferenceService with its defaults, or to every problem of its fields."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kvasir_operator.api.kinds import API_VERSION, KIND, NAME_LENGTH, NAME_PATTERN
from kvasir_operator.api.service import InferenceService, Spec
from kvasir_operator.api.structural_schema import Invalid, Schema, join, problems, structural
from kvasir_operator.api.validation import semantic_problems


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


def parse_fields(document: Mapping[str, Any], default_namespace: str = "default") -> InferenceService:
    """The InferenceService that `document` describes, its pods not checked yet (`admission/parse.py`).

    Raises InvalidService with every problem found.
    """
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
    found = list(_key_problems(document, ""))
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
        if isinstance(field, str) and field not in ("apiVersion", "kind", "metadata", "spec", "status")
    )
    return found


def _key_problems(value: object, path: str) -> Iterator[Invalid]:
    """Names of fields that are no strings, as YAML allows: `80: x`, `on: x`."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            if isinstance(name, str):
                yield from _key_problems(below, join(path, name))
            else:
                yield Invalid(join(path, str(name)), f"a field's name must be a string, is {name!r}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _key_problems(below, f"{path}[{index}]")


def _name_problems(name: object) -> list[Invalid]:
    found = list(problems(_SCHEMA["properties"]["metadata"]["properties"]["name"], name, "metadata.name"))
    return [Invalid(p.path, f"{p.reason}: Services and Deployments are named after it") for p in found]
