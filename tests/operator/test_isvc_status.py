"""The status says what is observed, and why."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from isvc_cases import deployments, service, settled

from kvasir_operator.api.structural_schema import Invalid
from kvasir_operator.plan.observed import Reference, observe, pod_state
from kvasir_operator.render import Object, Options, render
from kvasir_operator.status import derive
from kvasir_operator.status.evaluate import CONDITIONS
from kvasir_operator.status.events import transitions

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 4, 4, 5, tzinfo=UTC)
DESIRED = render(service(decode={"replicas": 2}), Options())


def live(**ready: int) -> list[Object]:
    """The desired Deployments with so many pods ready a role; all where nothing is said."""
    return [settled(o, ready.get(role)) for role, o in deployments(DESIRED).items()]


def computed(
    objects: list[Object],
    pods: list[Object] | None = None,
    failures: dict[Reference, str] | None = None,
    previous: dict[str, Any] | None = None,
    desired: list[Object] = DESIRED,
    now: datetime = NOW,
) -> derive.Status:
    return derive.accepted(
        desired,
        observe(objects, pods or []),
        failures or {},
        model="m",
        url="http://u",
        generation=4,
        previous=previous or {},
        now=now,
    )


def conditions(found: derive.Status) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in found.conditions}


def message(found: derive.Status, condition: str) -> str:
    return next(c.message for c in found.conditions if c.type == condition)


def pod(role: str, state: dict[str, Any]) -> Object:
    deployment = deployments(DESIRED)[role]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    return {"metadata": {"name": f"{deployment['metadata']['name']}-x", "labels": labels}, "status": state}


def test_all_is_ready_when_all_that_is_wanted_is_there() -> None:
    found = computed(live())
    assert conditions(found) == {
        "Accepted": ("True", "Valid"),
        "PrefillReady": ("True", "AllReady"),
        "DecodeReady": ("True", "AllReady"),
        "RouterReady": ("True", "AllReady"),
        "Progressing": ("False", "Complete"),
        "Degraded": ("False", "AsExpected"),
        "Ready": ("True", "AllReady"),
    }
    assert found.explain == ""
    assert found.decode == derive.RoleStatus(replicas=2, ready=2, summary="2/2")
    assert (found.url, found.model, found.observed_generation) == ("http://u", "m", 4)
    assert {c.observed_generation for c in found.conditions} == {4}


@pytest.mark.parametrize(("role", "condition"), CONDITIONS.items())
def test_one_role_that_is_not_ready_keeps_the_service_from_being_ready(role: str, condition: str) -> None:
    found = computed(live(**{role: 0}))
    untrue = {name for name, (value, _) in conditions(found).items() if value == "False"}
    assert untrue - {"Progressing", "Degraded"} == {condition, "Ready"}
    assert message(found, "Ready").startswith(f"{condition}: 0 of ")


def test_nothing_is_there_before_anything_is_created() -> None:
    found = computed([])
    assert conditions(found)["PrefillReady"] == ("False", "Starting")
    assert found.decode == derive.RoleStatus(replicas=2, ready=0, summary="0/2")


def test_counts_of_an_older_generation_are_not_believed() -> None:
    objects = live()
    for item in objects:
        item["metadata"]["generation"] = 2
    assert conditions(computed(objects))["Ready"] == ("False", "RollingOut")


CLAIM = {"name": "gpu", "resourceClaimTemplateName": "h100"}
MADE = {"resourceClaimStatuses": [{"name": "gpu", "resourceClaimName": "x-gpu"}]}


@pytest.mark.parametrize(
    ("spec", "state", "reason", "words"),
    [
        ({"resourceClaims": [CLAIM]}, {}, "WaitingForResourceClaim", "ResourceClaimTemplate h100"),
        (
            {"resourceClaims": [CLAIM]},
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "waits"}
                ]
            },
            "WaitingForResourceClaim",
            "waits",
        ),
        (
            {"resourceClaims": [{"name": "gpu", "resourceClaimName": "shared"}]},
            {},
            "WaitingForResourceClaim",
            "ResourceClaim shared",
        ),
        ({"resourceClaims": [CLAIM]}, MADE, "Starting", "0 of 2"),
        ({"resourceClaims": [CLAIM], "nodeName": "n"}, {}, "Starting", "0 of 2"),
        ({}, {}, "Starting", "0 of 2"),
    ],
)
def test_a_pod_that_waits_for_its_claim_says_so(
    spec: dict[str, Any], state: dict[str, Any], reason: str, words: str
) -> None:
    found = computed(live(decode=0), [{**pod("decode", state), "spec": spec}])
    assert conditions(found)["DecodeReady"] == ("False", reason)
    assert words in message(found, "DecodeReady")
    assert words in found.explain
    assert conditions(found)["Degraded"][0] == "False", "a claim may be made in a moment"


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                ]
            },
            "Unschedulable",
            "0/3 nodes",
        ),
        (
            {
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
                ]
            },
            "ImagePullBackOff",
            "no such image",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
                        "lastState": {"terminated": {"exitCode": 2, "message": "kvasir: error: no such model"}},
                    }
                ]
            },
            "CrashLoopBackOff",
            "kvasir: error: no such model",
        ),
        (
            {"containerStatuses": [{"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]},
            "OOMKilled",
            "exited with status 137",
        ),
        (
            {
                "containerStatuses": [
                    {"ready": False, "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1}}}
                ]
            },
            "Restarted",
            "exited with status 1",
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, "Evicted", "disk"),
    ],
)
def test_what_is_wrong_with_a_pod_is_said(state: dict[str, Any], reason: str, words: str) -> None:
    found = computed(live(decode=1), [pod("decode", state)])
    assert conditions(found)["DecodeReady"] == ("False", reason)
    assert words in message(found, "DecodeReady")
    assert pod("decode", state)["metadata"]["name"] in message(found, "DecodeReady")
    assert conditions(found)["Ready"] == ("False", reason)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]},
        {
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"lastState": {"terminated": {"exitCode": 1}}}],
        },
    ],
)
def test_a_pod_that_only_needs_time_is_no_trouble(state: dict[str, Any]) -> None:
    assert pod_state(pod("decode", state)).trouble is None


def test_a_long_message_keeps_its_end() -> None:
    state = {
        "containerStatuses": [{"state": {"terminated": {"exitCode": 1, "message": "x" * 5000 + "\nthe reason"}}}]
    }
    trouble = pod_state(pod("decode", state)).trouble
    assert trouble is not None
    assert trouble.message.endswith("x the reason")
    assert len(trouble.message) == 300


def test_trouble_of_another_revision_is_not_this_ones() -> None:
    state = {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    old = pod("decode", state)
    old["metadata"]["labels"] = {**old["metadata"]["labels"], "serving.kvasir.dev/revision": "old"}
    assert conditions(computed(live(decode=1), [old]))["DecodeReady"] == ("False", "Starting")


def test_a_deployment_that_cannot_create_pods_says_why() -> None:
    objects = live(decode=0)
    for item in objects:
        if item["spec"]["replicas"] == 2:
            failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
            item["status"] = {**item["status"], "conditions": [failure]}
    found = computed(objects)
    assert conditions(found)["DecodeReady"] == ("False", "FailedCreate")
    assert "exceeded quota" in message(found, "DecodeReady")


def test_an_object_that_the_server_refused_shows_in_its_roles_condition() -> None:
    name = deployments(DESIRED)["decode"]["metadata"]["name"]
    refused = {Reference("apps/v1", "Deployment", name): "spec.template is invalid"}
    found = computed([o for o in live() if o["metadata"]["name"] != name], failures=refused)
    assert conditions(found)["DecodeReady"] == ("False", "ApplyFailed")
    assert "spec.template is invalid" in message(found, "Ready")


def test_a_rollout_says_what_still_serves() -> None:
    new = render(service(decode={"replicas": 2}, drain={"deadlineSeconds": 1}), Options())
    found = computed(live(), desired=new)
    assert conditions(found)["DecodeReady"] == ("False", "RollingOut")
    assert "2 of revision" in message(found, "DecodeReady")
    assert "still serve" in message(found, "DecodeReady")


@pytest.mark.parametrize(
    ("spec", "ready"),
    [
        ({"prefill": {"replicas": 0}}, ("True", "AllReady")),
        ({"decode": {"replicas": 0}}, ("False", "ScaledToZero")),
        ({"router": {"replicas": 0}}, ("False", "ScaledToZero")),
    ],
)
def test_nothing_wanted_is_ready_but_serves_nothing(spec: dict[str, Any], ready: tuple[str, str]) -> None:
    desired = render(service(**spec), Options())
    found = computed([settled(o) for o in desired if o["kind"] == "Deployment"], desired=desired)
    (role,) = spec
    assert conditions(found)[f"{role.capitalize()}Ready"] == ("True", "ScaledToZero")
    assert conditions(found)["Ready"] == ready


def test_a_refused_spec_says_so_and_nothing_about_roles() -> None:
    problems = [Invalid("spec.model.uri", "is odd"), Invalid("spec.decode.replicas", "is too")]
    found = derive.rejected(problems, 7, {}, NOW)
    assert conditions(found) == {
        "Accepted": ("False", "Invalid"),
        "Stalled": ("True", "NotAccepted"),
        "Ready": ("False", "NotAccepted"),
    }
    assert message(found, "Accepted") == "spec.model.uri: is odd; spec.decode.replicas: is too"
    assert set(msgspec.to_builtins(found)) == {"observedGeneration", "conditions", "explain"}
    assert found.explain == "The spec is refused: spec.model.uri: is odd; spec.decode.replicas: is too."


def test_a_transition_time_moves_only_with_the_status() -> None:
    before = msgspec.to_builtins(computed(live(decode=0)))
    same = msgspec.to_builtins(computed(live(decode=1), previous=before, now=LATER))
    times = {c["type"]: c["lastTransitionTime"] for c in same["conditions"]}
    assert set(times.values()) == {"2026-01-02T03:04:05Z"}
    after = msgspec.to_builtins(computed(live(), previous=same, now=LATER))
    times = {c["type"]: c["lastTransitionTime"] for c in after["conditions"]}
    assert {name for name, time in times.items() if time == "2026-01-02T04:04:05Z"} == {"DecodeReady", "Ready"}


def test_transitions_are_the_conditions_whose_status_changed() -> None:
    def changed(previous: dict[str, Any], current: derive.Status) -> set[tuple[str, str]]:
        return {(c.type, c.status) for c in transitions(previous, current)}

    starting, complete = computed(live(decode=0, prefill=0, router=0)), computed(live())
    assert changed({}, starting) == {("Accepted", "True")}, "not to be ready at first is no news"
    before = msgspec.to_builtins(starting)
    assert changed(before, computed(live(decode=0, prefill=0, router=0), previous=before)) == set()
    assert ("Ready", "True") in changed(before, complete)
    assert changed({}, derive.rejected([Invalid("spec", "is odd")], 1, {}, NOW)) == {("Accepted", "False")}
