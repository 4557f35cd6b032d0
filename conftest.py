"""Order of the tests: the fast ones first, then those with real workers, then the real control plane.

With `-n 3`, as `make test` runs them, one process has the control plane's tests, which mostly wait. Two, which
yield the cores to it, have all others, a file at a time, those with real workers first; who is done first helps.
Of tests/dataplane one process has all: each of its stacks of workers takes 5 GB.
Tests marked `cuda` are skipped where there is no GPU, and the summary's last line says how many.
"""

import multiprocessing
import os
import ssl
from typing import Any

import httpx._transports.default as httpx_transports
import hypothesis
import pytest
from xdist.remote import Producer  # type: ignore[import-untyped]
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

STAGES = ("dataplane", "e2e", "soak")
CUDA = "needs an NVIDIA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, so that within a stage the files stay in order."""

    def stage(item: pytest.Item) -> int:
        return max((place for place, name in enumerate(STAGES, 1) if item.get_closest_marker(name)), default=0)

    items.sort(key=stage)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (not _is_e2e(item.nodeid), -stage(item)))
    wanting = [item for item in items if item.get_closest_marker("cuda")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=CUDA))


# What the processes that tests fork need not import again. It knows no modules of tests: its path is not theirs.
multiprocessing.set_forkserver_preload(
    [
        "kvasir_engine.api.app",
        "kvasir_engine.entrypoints.build",
        "kvasir_engine.entrypoints.follower_node",
        "kvasir_engine.entrypoints.worker_server",
        "openai",
        "transformers.tokenization_utils_tokenizers",
    ]
)

_create_ssl_context = httpx_transports.create_ssl_context
_contexts: dict[tuple[Any, ...], ssl.SSLContext] = {}


def _known_ssl_context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
    """httpx reads all authorities for each client, 20 ms of a core, and most clients of tests speak plain HTTP."""
    if verify is not True or cert is not None:
        return _create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
    key = trust_env, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if key not in _contexts:
        _contexts[key] = _create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
    return _contexts[key]


httpx_transports.create_ssl_context = _known_ssl_context

# No example has to be quick: how long one takes says how busy the machine is.
hypothesis.settings.register_profile("kvasir", deadline=None)
hypothesis.settings.load_profile("kvasir")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside the control plane's tests, which look at the clock, others leave the cores to them."""
    if "PYTEST_XDIST_WORKER" in os.environ and not _is_e2e(item.nodeid) and os.getpriority(os.PRIO_PROCESS, 0) == 0:
        os.nice(5)


_PIECES = ("e2e/", "tests/dataplane/")


class _ControlPlaneApart(LoadScopeScheduling):  # type: ignore[misc]
    """Work is given out by file, but the control plane's tests, which share a cluster, are one piece."""

    def _split_scope(self, nodeid: str) -> str:
        return next((piece for piece in _PIECES if nodeid.startswith(piece)), nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """In the order of the collected tests, whatever the files' sizes."""
    config.option.loadscopereorder = False
    return _ControlPlaneApart(config, log)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep what .ci/again.py asks: whether all tests ran."""
    cache = getattr(session.config, "cache", None)  # none with -p no:cacheprovider
    if cache is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        cache.set("kvasir/exitstatus", int(exitstatus))


def _is_e2e(nodeid: str) -> bool:
    return nodeid.startswith("e2e/")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line with the number of tests that no GPU was there for."""
    skipped = [each for each in terminalreporter.stats.get("skipped", []) if CUDA in str(each.longrepr)]
    if skipped:
        terminalreporter.write_sep("=", f"{len(skipped)} tests were SKIPPED: each {CUDA}", yellow=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
