"""PURE: with which operator's image and defaults the pods of a service are made.

An upgrade of the operator would otherwise roll every service at once. A service keeps what it was made with, which
its status remembers, until its spec names another image or leaves the choice to the operator that runs. What an
operator before made, which remembered nothing, is found by its pods' own templates.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvasir_operator.api import InferenceService
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.plan.observed import Observed
from kvasir_operator.plan.wanted import runs_pods
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.names import REVISION_LABEL, ROLE_LABEL


class ServiceRelease(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The image and defaults of a service's pods."""

    image: Annotated[str, Meta(extra_json_schema={"description": "The engine's image, where no role has its own."})]
    defaults: Annotated[int, Meta(extra_json_schema={"description": "Which defaults pods have, as a number."})]
    named: Annotated[
        str, Meta(extra_json_schema={"description": "spec.engine.image at that time; absent: the operator's own."})
    ] = ""


def release_of(
    service: InferenceService, options: Options, previous: Mapping[str, Any], observed: Observed
) -> ServiceRelease:
    """The release of a service. `options`: the running operator's; `previous`: the last status."""
    engine = service.spec.engine
    newest = ServiceRelease(engine.image or options.engine_image, options.defaults, engine.image)
    if engine.image_policy == "FollowOperator":
        return newest
    if "release" in previous:
        before = msgspec.convert(previous["release"], ServiceRelease)
        return before if before.named == engine.image else newest
    return _found(service, options, observed) or newest


def made_with(release: ServiceRelease, options: Options) -> Options:
    """The options that render that release."""
    return msgspec.structs.replace(options, engine_image=release.image, defaults=release.defaults)


def _found(service: InferenceService, options: Options, observed: Observed) -> ServiceRelease | None:
    """What the objects that are there were made with; `None` where there are none, or where the spec is another
    since, so that they are rolled in any case.

    The release that gives the most revisions that run; of several that do as well, the first image and the oldest
    defaults: what remembers nothing is old.
    """
    live = [item for item in observed.objects.values() if runs_pods(item)]
    runs = {_revision(item) for item in live}
    found = [
        ServiceRelease(image, defaults, service.spec.engine.image)
        for image in dict.fromkeys(image for item in live for image in _images(item))
        for defaults in range(1, options.defaults + 1)
    ]

    def fits(release: ServiceRelease) -> int:
        rendered = render(service, made_with(release, options))
        return sum(_revision(item) in runs for item in rendered if runs_pods(item))

    best = max(found, key=fits, default=None)
    return best if best and fits(best) else None


def _templates(item: Object) -> Iterator[Object]:
    spec = item["spec"]
    group = spec.get("leaderWorkerTemplate", {})
    yield from (each for each in (spec.get("template"), group.get("leaderTemplate")) if each)


def _revision(item: Object) -> tuple[str, str]:
    """The role of a workload and the revision of its pods."""
    labels = next(_templates(item))["metadata"]["labels"]
    return labels.get(ROLE_LABEL, ""), labels.get(REVISION_LABEL, "")


def _images(item: Object) -> Iterator[str]:
    for template in _templates(item):
        for container in template["spec"]["containers"]:
            if container["name"] == CONTAINER:
                yield container["image"]
