"""A model is loaded into its claim before workers are created for it, and the status says how far it is."""

import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from isvc_cases import FakeCluster, FakePods, document

from kvasir_engine.errors import UserError
from kvasir_engine.model.loading.progress import ProgressServer
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan.preload import Progress
from kvasir_operator.reconcile.pod_reader import PodReader
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options

MODEL = {"uri": "hf://org/m", "cache": {"claimName": "models"}}


class OperatorHarness:
    """A cluster in memory, its operator, and a Job whose end the test decides."""

    def __init__(self, **model: Any) -> None:
        self.cluster = FakeCluster(document(model={**MODEL, **model}))
        self.pods = FakePods()
        self.again: list[tuple[str, str]] = []

    def reconcile(self) -> None:
        Reconciler(
            self.cluster,
            Options(),
            lambda model: None,
            lambda: datetime(2026, 1, 1, tzinfo=UTC),
            self.pods,
            lambda namespace, name, seconds: self.again.append((namespace, name)),
        ).reconcile("default", "llama")

    def jobs(self) -> list[Object]:
        return [o for r, o in self.cluster.objects.items() if r.kind == "Job"]

    def workers(self) -> set[str]:
        """The worker Deployments, by role and revision."""
        names = {r.name for r in self.cluster.objects if r.kind == "Deployment"}
        return {name.removeprefix("llama-") for name in names} - {"router"}

    def end(self, condition: str, **more: str) -> None:
        (job,) = self.jobs()
        job["status"] = {"conditions": [{"type": condition, "status": "True", **more}]}

    def pod(self, **status: Any) -> None:
        labels = {"serving.kvasir.dev/role": "preload", "serving.kvasir.dev/inferenceservice": "llama"}
        owner = {"kind": "Job", "name": "llama-preload-abc", "controller": True}
        metadata = {"name": "llama-preload-x", "labels": labels, "ownerReferences": [owner]}
        self.cluster.listed_pods = [{"metadata": metadata, "status": status}]

    def cached(self) -> Object:
        return self.cluster.conditions()["ModelCached"]


def test_workers_come_once_the_model_is_there() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    assert len(stand.jobs()) == 1
    assert stand.workers() == set()
    assert "llama-router" in {r.name for r in stand.cluster.objects}
    assert (stand.cached()["status"], stand.cached()["reason"]) == ("False", "Loading")
    assert stand.cluster.conditions()["Ready"]["reason"] == "Loading"
    assert stand.again == [("default", "llama")]
    stand.end("Complete")
    stand.reconcile()
    assert {name.split("-")[0] for name in stand.workers()} == {"prefill", "decode"}
    assert stand.cached()["status"] == "True"
    assert len(stand.again) == 1, "nothing changes any more without an event"


def test_a_new_model_is_loaded_while_the_old_one_serves() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    stand.end("Complete")
    stand.reconcile()
    stand.cluster.settle()
    serving = stand.workers()
    stand.cluster.services["default", "llama"]["spec"]["model"]["revision"] = "v2"
    stand.reconcile()
    assert stand.workers() == serving, "neither replaced nor deleted"
    assert stand.cached()["status"] == "False"
    stand.end("Complete")
    stand.reconcile()
    assert stand.workers() > serving


def test_a_pool_is_scaled_while_its_job_runs_once_more() -> None:
    """Somebody deleted the finished Job; what runs has its model."""
    stand = OperatorHarness()
    stand.reconcile()
    stand.end("Complete")
    stand.reconcile()
    stand.cluster.settle()
    for target in [r for r in stand.cluster.objects if r.kind == "Job"]:
        del stand.cluster.objects[target]
    stand.cluster.services["default", "llama"]["spec"]["decode"] = {"replicas": 3}
    stand.reconcile()
    (decode,) = [
        o for r, o in stand.cluster.objects.items() if r.name.startswith("llama-decode-") and r.kind == "Deployment"
    ]
    assert decode["spec"]["replicas"] == 3


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        (Progress("download", 6_500_000_000, 16_100_000_000), "download 40% of 16.1 GB"),
        (Progress("download", 0, 0), "download"),
        (Progress("", 0, 0), "loads it"),
        (Progress("convert", 3, 30), "convert 3 of 30"),
        (Progress("download", 5, 2_000_000), "download 0% of 2.0 MB"),
        (Progress("download", 1, 3), "download 1 of 3"),
    ],
)
def test_the_status_says_how_far_it_is(progress: Progress, message: str) -> None:
    stand = OperatorHarness()
    stand.pod(phase="Running", podIP="10.0.0.7", conditions=[])
    stand.pods.told["10.0.0.7"] = progress
    stand.reconcile()
    stand.reconcile()
    assert stand.cached()["message"].endswith(message)


def test_what_is_wrong_with_the_job_is_what_the_status_says() -> None:
    stand = OperatorHarness()
    stand.reconcile()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    stand.pod(phase="Pending", containerStatuses=[{"name": "kvasir", "state": {"waiting": waiting}}])
    stand.reconcile()
    assert stand.cached()["reason"] == "ImagePullBackOff"
    assert "no such image" in stand.cached()["message"]
    stand.end("Failed", reason="BackoffLimitExceeded", message="Job has reached the specified backoff limit")
    stand.reconcile()
    assert stand.cached()["reason"] == "Failed"
    assert "delete Job llama-preload-" in stand.cached()["message"]
    assert stand.workers() == set()


def test_a_job_that_is_refused_is_in_the_status() -> None:
    stand = OperatorHarness()
    stand.cluster.refuse["Job"] = ClusterError(403, "exceeded quota: jobs")
    with pytest.raises(ClusterError):
        stand.reconcile()
    assert stand.cached()["reason"] == "ApplyFailed"
    assert "exceeded quota" in stand.cached()["message"]


def test_without_a_claim_nothing_is_said_about_a_cache() -> None:
    cluster = FakeCluster(document())
    Reconciler(cluster, Options(), lambda model: None).reconcile("default", "llama")
    assert "ModelCached" not in cluster.conditions()


def test_progress_crosses_from_the_fetching_process_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with ProgressServer("127.0.0.1", 0) as server:
        monkeypatch.setattr("kvasir_operator.reconcile.pod_reader.PORT", server.port)
        reader = PodReader()
        assert reader.progress("127.0.0.1") == Progress("", 0, 0)
        server.report("download", 5, 9)
        assert reader.progress("127.0.0.1") == Progress("download", 5, 9)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/other")
        with pytest.raises(UserError, match="cannot listen"):
            ProgressServer("127.0.0.1", server.port)


@pytest.mark.parametrize(
    "answer", [httpx.Response(503), httpx.Response(200, text="<html>"), httpx.ConnectError("no")]
)
def test_a_pod_that_does_not_answer_is_no_error(answer: Any) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "fd00::7"
        assert request.url.port == 8000
        if isinstance(answer, Exception):
            raise answer
        return answer

    reader = PodReader(httpx.MockTransport(reply))
    assert reader.progress("fd00::7") is None
