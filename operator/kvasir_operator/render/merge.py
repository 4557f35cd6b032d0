"""Merges the spec's pod template over a rendered one, and fits Kvasir's own resources to it.

A request of Kvasir's own follows a limit of the spec's that is below it, and a limit of Kvasir's own a request of
the spec's that is above it. Of devices a request is the limit, so whichever of them the spec names, the other
follows.
"""

from collections.abc import Mapping

from kvasir_engine.quantity import amount
from kvasir_operator.api.devices import claims, requested
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.api.strategic_merge import overlay
from kvasir_operator.api.workers import PodOverlay
from kvasir_operator.pod_validation.resources import extended
from kvasir_operator.render.names import Object


def merged(rendered: Object, overrides: PodOverlay) -> Object:
    """The rendered pod template, overridden by the spec's, which may be anything. Changes neither."""
    template = overlay(rendered, overrides.template)
    spec_resources = requested(overrides)
    containers = [
        {
            **each,
            "resources": _fit_resources(each["resources"], spec_resources["requests"], spec_resources["limits"]),
        }
        if each.get("name") == CONTAINER and _well_formed(each["resources"])
        else each
        for each in template["spec"]["containers"]
    ]
    return {**template, "spec": {**template["spec"], "containers": containers}}


def with_spec_resources(resources: Object, overrides: PodOverlay) -> Object:
    """Kvasir's own `resources`, overridden by the spec's field `resources`."""
    spec_resources, used = overrides.resources, claims(overrides)
    found = {
        "requests": {**resources["requests"], **spec_resources.requests},
        "limits": {**resources["limits"], **spec_resources.limits},
        "claims": used,
    }
    return {kind: value for kind, value in found.items() if value}


def _well_formed(resources: object) -> bool:
    return isinstance(resources, Mapping) and all(
        isinstance(resources.get(kind, {}), Mapping) for kind in ("requests", "limits")
    )


def _fit_resources(resources: Object, requests: Object, limits: Object) -> Object:
    """`resources` with Kvasir's own requests and limits made to fit the spec's `requests` and `limits`."""
    asks, allows = dict(resources.get("requests", {})), dict(resources.get("limits", {}))
    for name, limit in resources.get("limits", {}).items():
        if name in asks and name not in requests and _less(limit, asks[name], extended(name)):
            asks[name] = limit
    for name, request in requests.items():
        if name in limits:
            continue
        if extended(name) or (name in allows and _less(allows[name], request, False)):
            allows[name] = request
    found = {**resources, "requests": asks, "limits": allows}
    return {kind: value for kind, value in found.items() if value}


def _less(limit: object, request: object, whole: bool) -> bool:
    allowed, requested = amount(limit), amount(request)
    if allowed is None or requested is None:
        return False
    return allowed != requested if whole else allowed < requested
