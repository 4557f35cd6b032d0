"""The ranks of other workers that one rank exchanges KV with."""

from collections.abc import Callable

from kvasir_engine.connector.layout import pairs
from kvasir_engine.connector.nixl_agent import NixlAgent, PeerRefused
from kvasir_engine.protocol import Endpoint


class PeerRanks:
    """Of our rank `rank`. `in_use` says whether a lease or loan is open with an agent."""

    def __init__(self, agent: NixlAgent, rank: int, in_use: Callable[[str], bool]) -> None:
        self._agent = agent
        self._rank = rank
        self._in_use = in_use

    def partners(self, peer: Endpoint, incoming: bool) -> list[int]:
        """The ranks of `peer` that our KV comes from (`incoming`), or goes to."""
        ours, theirs = self._agent.endpoint.fingerprint, peer.fingerprint
        if incoming:
            return [from_ for from_, to in pairs(theirs, ours) if to == self._rank]
        return [to for from_, to in pairs(ours, theirs) if from_ == self._rank]

    def connect(self, peer: Endpoint, rank: int) -> None:
        """Connect to a rank. One that has another pool than it had is connected anew, unless it is in use.

        Raises PeerDied, PeerRefused.
        """
        agent = peer.agent_of(rank)
        if self._agent.differs(peer, rank):
            if self._in_use(agent):
                raise PeerRefused(f"{agent} is known with another pool, and in use")
            self._agent.forget(agent)
        self._agent.connect(peer, rank)
