"""Writes and reads from when they are decided to when their bytes are there and their digests known."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from kvasir_engine import faults
from kvasir_engine.connector import sender
from kvasir_engine.connector.digest_thread import DigestThread, TimedDigests
from kvasir_engine.connector.link_probe import LinkProbes
from kvasir_engine.connector.nixl_agent import NixlAgent, PeerDied, TransferHandle
from kvasir_engine.connector.sender import Key, Push
from kvasir_engine.connector.stats import TransferStats

log = logging.getLogger("transfer")

POST_TIME = 0.001
"""Seconds of posting after which the thread looks around: where a post blocks for its copy, one is enough."""


@dataclass(eq=False)
class _Copy:
    """The digests of a read are computed (`digests` None until then) once its bytes are there."""

    transfer: TransferHandle
    digests: "Future[TimedDigests] | None"
    reads: bool = False
    ok: bool | None = None
    last: bool = False
    """Whether all that goes under its lease is written with it."""
    timed: bool = False
    """Whether its pages are written again, to be timed."""


@dataclass(frozen=True)
class EndedCopy:
    """A write or a read has ended, well or not."""

    key: Key
    push: Push
    reads: bool
    ok: bool
    digests: TimedDigests


@dataclass(frozen=True)
class LostPeer:
    """The transport says that an agent is gone."""

    agent: str


class InflightCopies:
    """What one agent copies."""

    def __init__(
        self,
        agent: NixlAgent,
        digests: DigestThread,
        stats: TransferStats,
        probes: LinkProbes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`probes`: the link to a peer is measured with the first pages that are all written."""
        self._agent = agent
        self._probes = probes
        self._digests = digests
        self._stats = stats
        self._clock = clock
        self._layers = agent.endpoint.fingerprint.layers
        self._posts: deque[sender.Post] = deque()  # decided and not begun
        self._copies: dict[tuple[Key, Push], _Copy] = {}
        self._read_until = 0.0  # the time of reading that is counted

    def add(self, post: sender.Post) -> None:
        """Begin the copy `post` in one of the next calls of `advance`."""
        self._posts.append(post)

    @property
    def waiting(self) -> bool:
        """Whether a copy is decided and not begun, or one is timed."""
        return bool(self._posts) or bool(self._probes)

    def advance(self) -> Iterator[EndedCopy | LostPeer]:
        """Begin the copies whose turn has come, and report those that have ended."""
        until = self._clock() + POST_TIME
        while self._posts and self._clock() < until:
            post = self._posts.popleft()
            try:
                if post.reads:
                    self._read(post)
                else:
                    self._write(post)
            except PeerDied:
                yield LostPeer(post.key[0])
            except ValueError as error:  # what the lease says does not fit the peer's pool
                log.warning("nothing is copied agent=%s lease=%d reason=%s", *post.key, error)
                yield EndedCopy(post.key, post.push, post.reads, False, TimedDigests([], 0.0))
        for key, push in list(self._copies):
            try:
                ended = self._ended(key, push)
            except PeerDied:
                yield LostPeer(key[0])
                continue
            if ended is not None:
                yield ended

    def _write(self, post: sender.Post) -> None:
        """Begin to write, and to digest what is written."""
        (agent, _), push, layers = post.key, post.push, post.layers
        began = time.perf_counter()
        cut = self._agent.sent(agent)
        digests = self._digests.written(push.local, layers, cut)
        transfer = self._agent.write(agent, push.local, push.remote, layers)
        last = push.final and layers.stop == self._layers
        self._copies[post.key, push] = _Copy(transfer, digests, last=last)
        self._stats.writes += 1
        self._stats.descriptors += len(push.local)
        if cut is not None:
            self._stats.sent_bytes += len(push.local) * cut.moved_bytes(layers)
        self._stats.write_seconds += time.perf_counter() - began
        faults.hit(self._passed(push, layers))

    def _read(self, post: sender.Post) -> None:
        """Begin to read."""
        if not any(copy.reads for copy in self._copies.values()):
            self._read_until = time.perf_counter()
        self._digests.forget(post.push.local, self._agent.received(post.key[0]))
        transfer = self._agent.read(post.key[0], post.push.local, post.push.remote, post.layers)
        self._copies[post.key, post.push] = _Copy(transfer, None, reads=True)
        faults.hit("prefill.read_posted")

    def _ended(self, key: Key, push: Push) -> EndedCopy | None:
        """How a copy has ended, once; None if it is under way, or went with its peer."""
        copy = self._copies.get((key, push))
        if copy is None:
            return None
        if copy.ok is None:
            copy.ok = self._agent.poll(key[0], copy.transfer)
            if copy.ok and copy.last and self._probes is not None and self._probes.wants(key[0]):
                self._probes.begin(key[0], push.local, push.remote)
                copy.timed = True
        if copy.ok is None or (copy.timed and self._probes is not None and self._probes.busy(key[0])):
            return None
        copy.timed = False
        if copy.digests is None:
            copy.digests = self._digests.arrived(push.local, range(self._layers), self._agent.received(key[0]))
        if not copy.digests.done():
            return None
        del self._copies[key, push]
        if copy.reads:  # several go on at a time, so it is not the sum of theirs
            now = time.perf_counter()
            self._stats.read_seconds += now - self._read_until
            self._read_until = now
        return EndedCopy(key, push, copy.reads, copy.ok, self._digests.take(copy.digests))

    def died(self, agent: str) -> None:
        """Drop the copies from and to an agent that is gone."""
        if self._probes is not None:
            self._probes.died(agent)
        for gone in [each for each in self._copies if each[0][0] == agent]:
            self._agent.cancel(self._copies.pop(gone).transfer)
        self._posts = deque(post for post in self._posts if post.key[0] != agent)

    def _passed(self, push: Push, layers: range) -> str:
        """The fault point of a write that was posted."""
        if layers.stop != self._layers:
            return "prefill.pushed_layer"
        return "prefill.pushed_last" if push.final else "prefill.pushed_chunk"
