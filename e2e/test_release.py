"""The release: the operator under its own account with its shipped rules, and an uninstall that leaves nothing."""

from e2e import kvasir, steps
from e2e.controlplane.cluster import Cluster
from e2e.steps import eventually, pods

_RELEASED = "deployments,pods,services,serviceaccounts,roles,rolebindings"
_CLUSTER_WIDE = "clusterroles,clusterrolebindings"


def test_the_operator_runs_as_its_service_account_and_may_no_more_than_its_rules(cluster: Cluster) -> None:
    operators = pods(cluster, kvasir.NAMESPACE)
    (account,) = {operator["spec"]["serviceAccountName"] for operator in operators}
    assert account != "default"

    def may(verb: str, resource: str) -> str:
        user = f"system:serviceaccount:{kvasir.NAMESPACE}:{account}"
        done = cluster.kubectl("auth", "can-i", verb, resource, "--all-namespaces", "--as", user, check=False)
        return done.stdout.strip()

    assert may("patch", "deployments.apps") == "yes"
    for verb, resource in [
        ("get", "secrets"),
        ("create", "pods"),
        ("create", "clusterroles"),
        ("delete", "inferenceservices.serving.kvasir.dev"),
        ("delete", "nodes"),
    ]:
        assert may(verb, resource) == "no", f"{verb} {resource}"


def test_uninstall_leaves_nothing_but_the_custom_resource(cluster: Cluster) -> None:
    def settled() -> bool:
        everywhere = cluster.get("pods", "-A")["items"]
        leaving = [pod for pod in everywhere if "deletionTimestamp" in pod["metadata"]]
        return not leaving and len(steps.pod_networks(cluster)) == len(everywhere)

    eventually(settled, 120, "no pod of an earlier test is leaving", cluster)
    before, operators = steps.pod_networks(cluster), len(pods(cluster, kvasir.NAMESPACE))
    kvasir.uninstall(cluster)
    try:

        def gone() -> bool:
            names = {item["metadata"]["name"] for item in cluster.get(_RELEASED, "-n", kvasir.NAMESPACE)["items"]}
            wide = cluster.kubectl("get", _CLUSTER_WIDE, "-o", "name").stdout
            return names == {"default"} and kvasir.RELEASE not in wide

        eventually(gone, 120, "the release's objects are gone", cluster)
        eventually(
            lambda: len(before - steps.pod_networks(cluster)) == operators, 30, "its processes are gone", cluster
        )
        # Helm keeps custom resource definitions, so that an uninstall deletes no InferenceService.
        cluster.kubectl("get", "crd", "inferenceservices.serving.kvasir.dev")
    finally:
        kvasir.install(cluster)
        kvasir.wait_for_operator(cluster)
