"""An upgrade of the operator rolls no service that is there, unless its spec asks."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from isvc_cases import FakeCluster, document, pod_templates

from kvasir_operator.api import KIND
from kvasir_operator.plan.observed import Reference
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options
from kvasir_operator.render.options import DEFAULTS

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OLD = Options(engine_image="r/kvasir-engine:1", defaults=1, template_policy=UNRESTRICTED)
NEW = Options(engine_image="r/kvasir-engine:2", defaults=DEFAULTS, template_policy=UNRESTRICTED)
HUB = {"uri": "hf://a/b", "cache": {"claimName": "c"}}


def reconcile(cluster: FakeCluster, options: Options, times: int = 6) -> None:
    """Until rollouts are over: each time everything that was made is ready."""
    for _ in range(times):
        Reconciler(cluster, options, lambda model: None, lambda: NOW).reconcile("default", "llama")
        cluster.settle()
        for target, item in cluster.objects.items():
            if item["kind"] == "Job":
                done = {"conditions": [{"type": "Complete", "status": "True"}]}
                cluster.objects[target] = {**item, "status": done}


def templates(cluster: FakeCluster) -> dict[Reference, Object]:
    """What runs pods, and their templates."""
    return {
        target: item["spec"].get("template") or item["spec"]["leaderWorkerTemplate"]
        for target, item in cluster.objects.items()
        if target.kind in ("Deployment", "Job", "LeaderWorkerSet")
    }


def images(cluster: FakeCluster) -> set[str]:
    return {c["image"] for t in pod_templates(list(cluster.objects.values())) for c in t["spec"]["containers"]}


def forget(cluster: FakeCluster) -> None:
    """Be a service of an operator that remembered nothing."""
    cluster.services["default", "llama"]["status"].pop("release")


def edit(cluster: FakeCluster, **engine: Any) -> None:
    found = cluster.services["default", "llama"]
    found["spec"]["engine"] = engine
    found["metadata"]["generation"] += 1


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a Job": {"model": HUB},
    "over several nodes": {"decode": {"nodes": 2, "tensorParallel": 2}},
    "an own image": {"engine": {"image": "own:1"}},
    "a router of its own": {"router": {"image": "router:1"}},
    "a sidecar": {"decode": {"template": {"spec": {"containers": [{"name": "logs", "image": "fluent-bit:3"}]}}}},
}


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_upgrade_changes_no_pod(spec: dict[str, Any], remembers: bool) -> None:
    cluster = FakeCluster(document(**spec))
    reconcile(cluster, OLD)
    before = templates(cluster)
    assert before
    if not remembers:
        forget(cluster)
    reconcile(cluster, NEW)
    assert templates(cluster) == before
    release = cluster.services["default", "llama"]["status"]["release"]
    assert release["defaults"] == OLD.defaults
    assert release["image"] == spec.get("engine", {}).get("image", OLD.engine_image)


def test_a_new_service_has_the_image_and_defaults_of_the_operator_that_makes_it() -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, NEW)
    assert images(cluster) == {NEW.engine_image}
    status = cluster.services["default", "llama"]["status"]
    assert status["release"] == {"image": NEW.engine_image, "defaults": DEFAULTS}
    (router,) = [t for r, t in templates(cluster).items() if r.name == "llama-router"]
    (main,) = router["spec"]["containers"]
    assert "memory" in main["resources"]["limits"]
    assert "ephemeral-storage" in main["resources"]["requests"]


def test_an_edit_of_something_else_keeps_the_image() -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, OLD)
    edit(cluster, maxRunning=8)
    reconcile(cluster, NEW)
    assert images(cluster) == {OLD.engine_image}


ASKS: dict[str, tuple[dict[str, Any], str]] = {
    "by the policy": ({"imagePolicy": "FollowOperator"}, NEW.engine_image),
    "by another image": ({"image": "own:2"}, "own:2"),
}


@pytest.mark.parametrize(("engine", "image"), ASKS.values(), ids=ASKS)
def test_a_spec_that_asks_is_rolled_and_has_the_new_defaults(engine: dict[str, Any], image: str) -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, OLD)
    before = set(templates(cluster))
    edit(cluster, **engine)
    reconcile(cluster, NEW)
    assert images(cluster) == {image}
    assert len(before - set(templates(cluster))) == 2, "the workers' Deployments are others"
    assert cluster.services["default", "llama"]["status"]["release"]["defaults"] == DEFAULTS


def test_a_service_that_was_taken_along_once_stays_there() -> None:
    cluster = FakeCluster(document(engine={"imagePolicy": "FollowOperator"}))
    reconcile(cluster, OLD)
    reconcile(cluster, NEW)
    assert images(cluster) == {NEW.engine_image}
    edit(cluster)
    reconcile(cluster, msgspec.structs.replace(NEW, engine_image="r/kvasir-engine:3"))
    assert images(cluster) == {NEW.engine_image}


def test_a_name_that_is_taken_back_gives_the_choice_to_the_operator_that_runs() -> None:
    cluster = FakeCluster(document(engine={"image": "own:1"}))
    reconcile(cluster, OLD)
    edit(cluster)
    reconcile(cluster, NEW)
    assert images(cluster) == {NEW.engine_image}


def test_a_spec_that_is_refused_meanwhile_forgets_nothing() -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, OLD)
    found = cluster.services["default", "llama"]
    spec = dict(found["spec"])
    found["spec"]["router"] = {"expose": {"host": "a.b"}}
    reconcile(cluster, NEW, 1)
    assert cluster.conditions()["Accepted"]["status"] == "False"
    cluster.services["default", "llama"]["spec"] = spec
    reconcile(cluster, NEW)
    assert images(cluster) == {OLD.engine_image}


def test_pods_that_an_edit_rolls_in_any_case_have_what_is_new() -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, OLD)
    forget(cluster)
    cluster.services["default", "llama"]["spec"]["drain"] = {"deadlineSeconds": 7}
    reconcile(cluster, NEW)
    assert images(cluster) == {NEW.engine_image}


def test_of_two_images_that_run_the_one_that_fits_the_spec_is_found() -> None:
    cluster = FakeCluster(document())
    reconcile(cluster, OLD)
    edit(cluster, imagePolicy="FollowOperator")
    reconcile(cluster, NEW, 1)  # in the middle of a rollout
    assert images(cluster) == {OLD.engine_image, NEW.engine_image}
    forget(cluster)
    edit(cluster, imagePolicy="Keep")
    reconcile(cluster, msgspec.structs.replace(NEW, engine_image="r/kvasir-engine:3"))
    (image,) = images(cluster)
    assert image in (OLD.engine_image, NEW.engine_image)
    assert cluster.services["default", "llama"]["kind"] == KIND
