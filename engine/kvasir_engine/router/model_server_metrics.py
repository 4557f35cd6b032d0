"""Metrics of a router and its workers for endpoint pickers of the Gateway API Inference Extension.

The names are vLLM's, which pickers read by default (model server protocol of
kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol). A picker chooses among
routers, so each router reports all workers on which it may place requests.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvasir_engine.router.pool import WorkerPool

WAITING = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
CACHE = "vllm:cache_config_info"


class ModelServerCollector(Collector):
    """Reads the pool when scraped. `held`: the number of requests that wait at the router itself."""

    def __init__(self, pool: WorkerPool, held: Callable[[], int], registry: CollectorRegistry) -> None:
        self._pool = pool
        self._held = held
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The present metrics."""
        workers = [(each.load, each.peer) for each in self._pool.ready() if each.peer is not None]
        # A request ends in a decode worker's pages, however it came there.
        caches = [(load, peer.endpoint) for load, peer in workers if peer.role != "prefill"]
        pages = sum(endpoint.region.pages for _, endpoint in caches)
        unused = sum(load.free_pages + load.cached_pages for load, _ in caches)
        yield _gauge(WAITING, "Requests that wait.", self._held() + sum(load.waiting for load, _ in workers))
        yield _gauge(RUNNING, "Requests that run.", sum(load.running for load, _ in workers))
        share = min(1.0, max(0.0, 1 - unused / pages)) if pages else 0.0
        yield _gauge(KV_USAGE, "Share of the decode workers' KV pages that requests use, 0 to 1.", share)
        info = GaugeMetricFamily(CACHE, "The decode workers' KV pages.", labels=["block_size", "num_gpu_blocks"])
        if caches:
            size = min(endpoint.fingerprint.page_size for _, endpoint in caches)
            info.add_metric((str(size), str(pages)), 1)
        yield info


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
