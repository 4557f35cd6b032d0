"""The worker's Prometheus metrics, read from the engine's counters when scraped."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.core.cached_page_checks import CheckStats
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.grammar_service import GrammarStats
from kvasir_engine.core.stats import TokenCounts
from kvasir_engine.kv.pages import Owner
from kvasir_engine.status_reports import LinkReport


class EngineCollector(Collector):
    """Collects from `engine` without stopping it, so the values are not all from the same moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        engine, stats, pool = self._engine, self._engine.stats, self._engine.cache.pool
        pages = GaugeMetricFamily("kvasir_kv_pages", "Pages of the KV pool by class of owner.", labels=["owner"])
        for owner in Owner:
            pages.add_metric([owner.name.lower()], pool.count(owner))
        yield pages
        leases = GaugeMetricFamily("kvasir_kv_leases", "Leases by state, on both sides.", labels=["state"])
        leases.add_metric(["open"], len(engine.leases.open))
        leases.add_metric(["fenced"], len(engine.leases.fenced))
        leases.add_metric(["writing"], len(engine.pushes.open))
        leases.add_metric(["lent"], len(engine.loans.lent))
        leases.add_metric(["reading"], len(engine.readback.reads))
        yield leases
        for name, text, value in (
            ("kvasir_kv_received_pages", "KV pages that other workers wrote here.", stats.received_pages),
            ("kvasir_kv_received_tokens", "Prompt tokens whose KV others wrote here.", stats.requests.received),
            ("kvasir_kv_skipped_tokens", "Those that were here already.", stats.requests.skipped),
            ("kvasir_kv_sent_pages", "KV pages written to other workers.", stats.sent_pages),
            ("kvasir_kv_read_pages", "KV pages read from other workers.", engine.readback.stats.pages),
            ("kvasir_kv_read_tokens", "Tokens whose KV was read from others.", engine.readback.stats.tokens),
            ("kvasir_kv_rejected_messages", "Handoff messages that fitted no lease.", stats.rejected_messages),
            ("kvasir_prefix_cache_hit_tokens", "Prompt tokens found in the radix tree.", stats.requests.cached),
            ("kvasir_prefix_cache_miss_tokens", "Prompt tokens computed.", stats.requests.computed),
            ("kvasir_generation_tokens", "Tokens sampled.", stats.requests.generated),
            ("kvasir_forced_tokens", "Tokens that grammars forced, sampled by no step.", stats.requests.forced),
            ("kvasir_preemptions", "Sequences that gave way for lack of pages.", stats.preemptions),
        ):
            yield CounterMetricFamily(name, text, value)
        prompts = "Prompt tokens that were prepared here, by the origin of their KV."
        prompt = CounterMetricFamily("kvasir_prompt_tokens", prompts, labels=["source"])
        for source in ("computed", "cached", "read"):
            prompt.add_metric([source], getattr(stats.requests, source))
        yield prompt
        others = "Tokens of canaries, which are in no other counter of tokens."
        canary = CounterMetricFamily("kvasir_canary_tokens", others, labels=["source"])
        for source in TokenCounts.__dataclass_fields__:
            canary.add_metric([source], getattr(stats.canaries, source))
        yield canary
        failures = CounterMetricFamily("kvasir_request_failures", "Requests that failed here.", labels=["code"])
        for code, count in list(stats.failures.items()):
            failures.add_metric([code], count)
        yield failures
        reads = CounterMetricFamily("kvasir_kv_reads", "Reads of others' pages, by outcome.", labels=["outcome"])
        for outcome, count in list(engine.readback.stats.outcomes.items()):
            reads.add_metric([outcome], count)
        yield reads
        proofs = CounterMetricFamily("kvasir_kv_reclaims", "Leases taken back, by proof.", labels=["proof"])
        for proof, count in list(stats.proofs.items()):
            proofs.add_metric([proof], count)
        yield proofs
        if engine.connector is not None:
            yield from self._handoff(engine.connector.stats)
            yield from self._links(engine.connector.links)
        grammars = GrammarStats() if engine.grammars.service is None else engine.grammars.service.stats
        yield SummaryMetricFamily(
            "kvasir_grammar_compile_seconds",
            "What requests waited for their grammars, compiled or cached.",
            grammars.compiled,
            grammars.compile_seconds,
        )
        waiting = len(engine.waiting) + engine.grammars.compiling
        if engine.checks is not None:
            yield from self._checks(engine.checks.stats)
        yield GaugeMetricFamily("kvasir_requests_running", "Sequences in the batch.", len(engine.running))
        yield GaugeMetricFamily("kvasir_requests_waiting", "Requests not admitted yet.", waiting)
        most = engine.requests.queue.length
        yield GaugeMetricFamily("kvasir_requests_waiting_limit", "Most requests that wait; 0: no limit.", most)
        computed = CounterMetricFamily("kvasir_steps", "Steps computed, as a CUDA graph or not.", labels=["mode"])
        computed.add_metric(["graph"], stats.replayed_steps)
        computed.add_metric(["eager"], stats.eager_steps)
        yield computed
        idle = "Time that the device waited for its next step while requests ran."
        yield CounterMetricFamily("kvasir_step_idle_seconds", idle, stats.idle_seconds)
        yield SummaryMetricFamily("kvasir_step_seconds", "Time of steps.", stats.steps, stats.step_seconds)

    @staticmethod
    def _checks(stats: CheckStats) -> Iterable[Metric]:
        verified = "Cached pages compared with what was stored, before they were used again."
        yield CounterMetricFamily("kvasir_kv_cached_pages_verified", verified, stats.pages)
        spoiled = "Cached pages that were not what was stored, and were computed again."
        yield CounterMetricFamily("kvasir_kv_cached_pages_spoiled", spoiled, stats.spoiled)
        yield CounterMetricFamily("kvasir_kv_cached_pages_verify_seconds", "Time in that.", stats.seconds)

    @staticmethod
    def _links(links: Iterable[LinkReport]) -> Iterable[Metric]:
        labels = ["peer", "transport", "rank"]
        rate = "KV of a rank to another worker's agent, as measured when they met."
        rates = GaugeMetricFamily("kvasir_kv_link_bytes_per_second", rate, labels=labels)
        slow = "1 where that is a tenth of what the fabric should give."
        degraded = GaugeMetricFamily("kvasir_kv_link_degraded", slow, labels=labels)
        for link in links:
            values = [link.peer, link.transport, str(link.rank)]
            rates.add_metric(values, link.bytes_per_second)
            degraded.add_metric(values, bool(link.problem))
        yield from (rates, degraded)

    @staticmethod
    def _handoff(stats: TransferStats) -> Iterable[Metric]:
        yield CounterMetricFamily("kvasir_kv_sent_bytes", "KV written to other workers.", stats.sent_bytes)
        received = "KV that other workers wrote and that was found complete."
        yield CounterMetricFamily("kvasir_kv_received_bytes", received, stats.received_bytes)
        yield CounterMetricFamily("kvasir_kv_read_bytes", "KV read from other workers.", stats.read_bytes)
        yield CounterMetricFamily("kvasir_kv_read_seconds", "Time that ranks were reading.", stats.read_seconds)
        yield CounterMetricFamily("kvasir_kv_writes", "Writes posted.", stats.writes)
        yield CounterMetricFamily("kvasir_kv_write_descriptors", "Pieces of pages written.", stats.descriptors)
        yield CounterMetricFamily("kvasir_kv_write_seconds", "Time in posting writes.", stats.write_seconds)
        yield CounterMetricFamily("kvasir_kv_digest_seconds", "Time in digests.", stats.digest_seconds)
        yield CounterMetricFamily("kvasir_kv_digests", "Pieces of pages digested.", stats.digests)
        yield CounterMetricFamily(
            "kvasir_kv_digest_failures", "Pieces of pages that came wrong.", stats.digest_failures
        )
        yield CounterMetricFamily("kvasir_kv_peers_died", "Peers whose death was seen.", stats.peers_died)
        yield SummaryMetricFamily(
            "kvasir_kv_exposed_seconds",
            "From the prompt's last layer computed to its last byte written.",
            stats.handoffs,
            stats.exposed_seconds,
        )
