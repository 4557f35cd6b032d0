"""PURE: conditions from the rates that prefill workers measured of their links to decode workers."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvasir_engine.status_reports import LinkReport
from kvasir_operator.status.evaluate import VERIFIED, ConditionState

DEGRADED = "FabricDegraded"
MOST = 3


class MeasuredLink(msgspec.Struct, frozen=True):
    """A link of the worker in `pod`."""

    pod: str
    link: LinkReport

    @property
    def problem(self) -> str:
        """Between whom it is slow, and what to look at."""
        rank = f" rank {self.link.rank}" if self.link.rank else ""
        return f"pod {self.pod}{rank} to {self.link.peer}: {self.link.problem}"


def shown_rates(links: Sequence[MeasuredLink] | None, verified: ConditionState, previous: Mapping[str, Any]) -> str:
    """What the message of KVTransferVerified says, with the rate of the slowest link and what carries it.

    `links` is None where nobody answered: what was said before stands, while the rest of it does.
    """
    if verified.true is not True:
        return verified.message
    if links is None:
        nothing: Mapping[str, Any] = {}
        before = next((c for c in previous.get("conditions", []) if c["type"] == VERIFIED), nothing)
        same = before.get("reason") == verified.reason
        return str(before["message"]) if same else verified.message
    if not links:
        return verified.message
    slowest = min(links, key=lambda each: each.link.bytes_per_second).link
    rate = f"{slowest.bytes_per_second / 1e9:.2g} GB/s by {slowest.transport}"
    return f"{verified.message}; {rate}" + (f" at the slowest of {len(links)} links" if len(links) > 1 else "")


def fabric_degraded(links: Sequence[MeasuredLink] | None, previous: Mapping[str, Any]) -> list[ConditionState]:
    """Whether a link of any rank gives only a tenth of its fabric's rate; empty where none was measured.

    The slowest ones are named, and the others counted. Where no worker answers, the last state holds.
    """
    if links is None:
        before = next((c for c in previous.get("conditions", []) if c["type"] == DEGRADED), None)
        if before is None:
            return []
        true = before["status"] == "True"
        return [ConditionState(DEGRADED, true, before["reason"], before["message"], trouble=true)]
    slow = sorted((each for each in links if each.link.problem), key=_slowest_first)
    if slow:
        problems = "; ".join(each.problem for each in slow[:MOST])
        more = f"; and {len(slow) - MOST} more links" if len(slow) > MOST else ""
        return [ConditionState(DEGRADED, True, "SlowLink", problems + more, trouble=True)]
    if links:
        return [ConditionState(DEGRADED, False, "AsExpected", "no link is known to be slower than its fabric")]
    return []


def _slowest_first(measured: MeasuredLink) -> tuple[int, str, int, str]:
    link = measured.link
    return link.bytes_per_second, measured.pod, link.rank, link.peer
