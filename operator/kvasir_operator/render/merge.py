"""The spec's template over a rendered one, and what that changes of what Kvasir itself asks for.

A request of Kvasir's own follows a limit of the spec's that is below it, and a limit of Kvasir's own a request of
the spec's that is above it. Of devices a request is the limit, so whichever of them the spec names, the other
follows.
"""

from collections.abc import Mapping

from kvasir_engine.quantity import amount
from kvasir_operator.api.strategic_merge import overlay
from kvasir_operator.api.workers import PodOverlay
from kvasir_operator.pod_validation.resources import extended
from kvasir_operator.render.devices import CONTAINER, asked, claims
from kvasir_operator.render.names import Object


def merged(rendered: Object, said: PodOverlay) -> Object:
    """The rendered pod template with the spec's over it, which may be anything. Neither is changed."""
    template = overlay(rendered, said.template)
    theirs = asked(said)
    containers = [
        {**each, "resources": settled(each["resources"], theirs["requests"], theirs["limits"])}
        if each.get("name") == CONTAINER and _well_formed(each["resources"])
        else each
        for each in template["spec"]["containers"]
    ]
    return {**template, "spec": {**template["spec"], "containers": containers}}


def said_over(resources: Object, said: PodOverlay) -> Object:
    """`resources` of Kvasir's own with those of the spec's field `resources` over them."""
    theirs, used = said.resources, claims(said)
    found = {
        "requests": {**resources["requests"], **theirs.requests},
        "limits": {**resources["limits"], **theirs.limits},
        "claims": used,
    }
    return {kind: value for kind, value in found.items() if value}


def _well_formed(resources: object) -> bool:
    return isinstance(resources, Mapping) and all(
        isinstance(resources.get(kind, {}), Mapping) for kind in ("requests", "limits")
    )


def settled(resources: Object, requests: Object, limits: Object) -> Object:
    """`resources` with what is not the spec's own made to fit. `requests` and `limits`: what the spec says."""
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
    allowed, asked = amount(limit), amount(request)
    if allowed is None or asked is None:
        return False
    return allowed != asked if whole else allowed < asked
