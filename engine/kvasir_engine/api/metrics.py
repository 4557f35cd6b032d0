"""Metrics of the front end's requests."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvasir_engine.api.histogram import LoopHistogram

_HOLDS = (1800, 7200, 21_600, 86_400)  # requests may be held for a day while a worker starts
_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80, 160, 320, 640, *_HOLDS)
_ITL = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, *_HOLDS)


class ApiMetrics:
    """`code` is the HTTP status; 499 when the client left, 500 when an answer failed after its 200."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("kvasir_requests", "Requests answered.", ["code"], registry=registry)
        self.ttft = Histogram(
            "kvasir_request_ttft_seconds",
            "From a request's arrival to its first token.",
            buckets=_TTFT,
            registry=registry,
        )
        self.itl = LoopHistogram("kvasir_request_itl_seconds", "Between one token and the next.", _ITL, registry)
        self.seconds = Histogram(
            "kvasir_request_seconds", "From a request's arrival to its end.", buckets=_REQUEST, registry=registry
        )
        self.inflight = Gauge("kvasir_router_inflight", "Requests being answered.", registry=registry)
