"""PURE: which workers' KV is the same, as far as that can be said before a pod runs.

A worker's hello tells its real KV fingerprint (`protocol.Fingerprint`), from the weights and pool it has. What
the spec decides of it is here: a name for it is the label `serving.kvasir.dev/kv` of the workers' pods. Workers
with equal labels pair, whatever their revisions; an edit that changes the label has to move pairs together.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvasir_engine.config import KV_FIELDS
from kvasir_engine.model.loading.uri import HubURI, ModelURIError
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_operator.api.worker_settings import SpecSetting, by_field, by_flag, by_variable

if TYPE_CHECKING:
    from kvasir_operator.api import Spec, WorkerRole

LENGTH = 8


_FLAGS = {field.flag: field for field in KV_FIELDS.values()}
"""What decides a worker's KV, by flag. Not the tensor-parallel size: workers of different sizes pair
(`connector/layout.py`)."""
_SAME = {"dtype": {"auto": "bfloat16"}}
# Labels name these also where they are the defaults. A later setting is named where it is not its default, so that
# a new operator gives the pods that are there the labels that they have.
_ALWAYS = frozenset({"model", "revision", "dtype", "page-size", "kv-digests"})


def fingerprint(spec: "Spec", role: "WorkerRole") -> str:
    """A name for the KV of `role`'s workers: equal exactly where all that decides it is equal."""
    values = {
        name: setting.value
        for name, setting in settings(spec, role).items()
        if name in _ALWAYS or setting.value != _FLAGS[name].default_text
    }
    if _is_power_of_two(values["page-size"]):
        values["page-size"] = (
            "a power of two"  # of two such sizes one is a multiple of the other, so that they pair
        )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:LENGTH]


def unpaired(spec: "Spec") -> Iterator[tuple[str, str]]:
    """Why prefill and decode of one spec could not pair: the field, and the reason."""
    prefill, decode = settings(spec, "prefill"), settings(spec, "decode")
    for name, theirs in decode.items():
        ours = prefill[name]
        if ours.value != theirs.value and not (name == "page-size" and _multiples(ours.value, theirs.value)):
            # The field to name is the one that departs from what holds for both.
            shared = theirs.path == "spec.decode" or theirs.path.startswith("spec.model")
            odd, other = (ours, theirs) if shared else (theirs, ours)
            yield (
                odd.path,
                f"{name} {odd.value!r} cannot pair with {other.value!r} of {other.path}: KV would not fit",
            )


def settings(spec: "Spec", role: "WorkerRole") -> dict[str, SpecSetting]:
    """The settings that decide the KV of `role`'s workers, by flag, wherever the spec has them."""
    model = spec.model
    uri, revision = _model(model.uri, model.revision)
    rendered = {
        "model": SpecSetting(uri, "spec.model.uri"),
        "revision": SpecSetting(revision, "spec.model.revision"),
        "dtype": SpecSetting(model.dtype, "spec.model.dtype"),
    }
    given = {**by_variable(spec, role), **by_field(spec, role), **by_flag(spec, role)}
    given |= {name: setting for name, setting in rendered.items() if setting.value}
    found = {
        name: given.get(name) or SpecSetting(field.default_text, f"spec.{role}") for name, field in _FLAGS.items()
    }
    return {name: SpecSetting(_canonical(name, setting.value), setting.path) for name, setting in found.items()}


def _canonical(name: str, value: str) -> str:
    """One spelling for all values that the engine reads alike."""
    value = _FLAGS[name].canonical(value)
    return _SAME.get(name, {}).get(value, value)


def _is_power_of_two(value: str) -> bool:
    return value.isdecimal() and int(value) > 0 and int(value) & (int(value) - 1) == 0


def _multiples(one: str, other: str) -> bool:
    """Whether pages of these sizes fit each other."""
    sizes = [int(each) if each.isdecimal() else 0 for each in (one, other)]
    return min(sizes) > 0 and max(sizes) % min(sizes) == 0


def _model(uri: str, revision: str) -> tuple[str, str]:
    """The model without its revision, and the revision: it may stand in either field."""
    try:
        parsed = parse_uri(uri)
    except ModelURIError:
        return uri, revision
    if isinstance(parsed, HubURI):
        return parsed.repo, revision or parsed.revision or ""
    return str(parsed), revision
