"""How a field of the spec is described: its constraints, and the sentence that `kubectl explain` shows."""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvasir_engine.quantity import QUANTITY
from kvasir_operator.api.structural_schema import LIMIT

_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
# A DNS subdomain; the name of a label or resource, a domain before it or not; one with a domain.
OBJECT_NAME = rf"^{_LABEL}(\.{_LABEL})*$"
QUALIFIED_NAME = rf"^({_LABEL}(\.{_LABEL})*/)?[A-Za-z0-9]([-._A-Za-z0-9]{{0,61}}[A-Za-z0-9])?$"
RESOURCE_NAME = QUALIFIED_NAME.replace("/)?", "/)")

Quantity = Annotated[int | str, Meta(extra_json_schema={"pattern": QUANTITY})]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every object inside the spec."""


def text(description: str, pattern: str | None = None, length: int | None = None) -> Meta:
    """A string: what it must match, and its most characters."""
    return Meta(pattern=pattern, max_length=length, extra_json_schema={"description": description})


def count(description: str, least: int, most: int = 2**31 - 1) -> Meta:
    """An integer and its bounds, both allowed."""
    return Meta(ge=least, le=most, extra_json_schema={"description": description})


def listed(description: str, most: int) -> Meta:
    """A list of at most so many objects, each known by its name."""
    by_name = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    return Meta(max_length=most, extra_json_schema={"description": description, **by_name})


def words(description: str, most: int) -> Meta:
    """A list of at most so many strings."""
    return Meta(max_length=most, extra_json_schema={"description": description})


def entries(description: str, most: int) -> Meta:
    """A mapping of at most so many entries."""
    return Meta(max_length=most, extra_json_schema={"description": description})


def limit(description: str) -> Meta:
    """A count, or a percentage of a role's replicas."""
    return Meta(extra_json_schema={"pattern": LIMIT, "description": description})


def about(description: str) -> Meta:
    """What needs no more than its type."""
    return Meta(extra_json_schema={"description": description})
