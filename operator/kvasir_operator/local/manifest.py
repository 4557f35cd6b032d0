"""The manifest of a local run: one InferenceService, and the Secrets it names."""

import base64
import binascii
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kvasir_operator.admission import parse
from kvasir_operator.api import KIND, InferenceService, InvalidService
from kvasir_operator.local.errors import LocalError
from kvasir_operator.pod_validation import UNRESTRICTED, PodPolicy
from kvasir_operator.render import Options, with_release_defaults


class Manifest(msgspec.Struct, frozen=True):
    """What a manifest says. `secrets` holds each Secret's data by its name."""

    service: InferenceService
    secrets: dict[str, dict[str, bytes]]


def read(path: str) -> str:
    """The manifest's text; `-` is standard input. Raises LocalError."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _documents(text: str, source: str) -> list[Any]:
    try:
        return [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        raise LocalError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def services_of(text: str, source: str, policy: PodPolicy) -> tuple[list[InferenceService], list[str]]:
    """All InferenceServices of a manifest, and what else it holds, in words. Raises LocalError, also where `policy`
    refuses their pods."""
    services: list[InferenceService] = []
    others: list[str] = []
    for index, document in enumerate(_documents(text, source)):
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            raise LocalError(f"{source}: document {index + 1} is {_named(document)}")
        if document["kind"] != KIND:
            others.append(_named(document))
            continue
        try:
            services.append(parse(document, policy=policy))
        except InvalidService as error:
            raise LocalError(f"{source}: {error}") from None
    if not services:
        raise LocalError(f"{source}: holds no {KIND}")
    return services, others


def load(text: str, source: str) -> Manifest:
    """The documents of a manifest. `source` names it in errors. Raises LocalError."""
    documents = _documents(text, source)
    services: list[InferenceService] = []
    secrets: list[Mapping[str, Any]] = []
    for index, document in enumerate(documents):
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind == KIND:
            try:
                # What runs here are the user's own processes, which need nobody's consent.
                services.append(with_release_defaults(parse(document, policy=UNRESTRICTED), Options()))
            except InvalidService as error:
                raise LocalError(f"{source}: {error}") from None
        elif kind == "Secret":
            secrets.append(document)
        else:
            raise LocalError(
                f"{source}: document {index + 1} is {_named(document)}; one {KIND} and its Secrets can be run"
            )
    if len(services) != 1:
        names = f" ({', '.join(s.name for s in services)})" if services else ""
        raise LocalError(f"{source}: holds {len(services)} {KIND}s{names}, exactly one can be run")
    return Manifest(services[0], dict(_secret(s, services[0].namespace, source) for s in secrets))


def _named(document: object) -> str:
    if not isinstance(document, dict) or not document.get("kind"):
        return "no Kubernetes object"
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"the {document['kind']} {name!r}"


def _secret(document: Mapping[str, Any], namespace: str, source: str) -> tuple[str, dict[str, bytes]]:
    metadata = document.get("metadata") or {}
    name = metadata.get("name")
    if not isinstance(name, str):
        raise LocalError(f"{source}: a Secret without metadata.name")
    if (metadata.get("namespace") or "default") != namespace:
        raise LocalError(f"{source}: Secret {name!r} is not in the {KIND}'s namespace {namespace!r}")
    data: dict[str, bytes] = {}
    for key, value in (document.get("data") or {}).items():
        try:
            data[key] = base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise LocalError(f"{source}: Secret {name!r}: data.{key} is not base64") from None
    for key, value in (document.get("stringData") or {}).items():
        if not isinstance(value, str):
            raise LocalError(f"{source}: Secret {name!r}: stringData.{key} is not a string")
        data[key] = value.encode()
    return name, data
