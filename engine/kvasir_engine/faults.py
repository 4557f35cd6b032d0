"""Fault points, for tests only: a process that dies, stops or hangs up exactly at a step of the protocol.

`KVASIR_FAULT` names them, `POINT[@N]=ACTION` and commas between several: `prefill.pushed_chunk@2=kill` sends
SIGKILL to this process when it passes that point for the second time. Read once, at import. Without the variable
`hit` and `closable` are functions that do nothing, and nothing can switch them on later. An entry that begins with
`rankN:` is for the worker's rank N, a process of its own.
"""

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

from kvasir_engine.errors import UserError

VARIABLE = "KVASIR_FAULT"

Action = Literal["kill", "stop", "close", "exit"]
"""SIGKILL or SIGSTOP to this process; `close` its WebSockets between router and worker; `exit` with status 70."""

POINTS = frozenset(
    {
        "prefill.submitted",  # a prompt with a lease has arrived
        "prefill.pushed_layer",  # a write of a layer of some pages is posted, more layers follow
        "prefill.pushed_chunk",  # the last layer of some pages is posted, more pages follow
        "prefill.pushed_last",  # the last write is posted
        "prefill.completing",  # all is written, Complete is not sent
        "prefill.reading",  # a read of a decode worker's pages is posted
        "prefill.read",  # they are here and right, the decode worker is not told
        "prefill.completed",  # Complete is sent, the router is not told
        "decode.reserved",  # a reservation has arrived
        "decode.lent",  # pages are lent to the prefill worker, the router is not told
        "decode.lending",  # their digests are known, the prefill worker's rank is not told
        "decode.leased",  # pages are leased, the router is not told
        "decode.written",  # some pages are announced, not checked
        "decode.settled",  # the KV is there and its first token known
        "decode.stepped",  # the first token computed from KV that came
        "router.reserved",  # Reserve is sent
        "router.leased",  # the lease has arrived, prefill is not asked
        "router.submitted",  # the prompt and lease are sent to prefill
        "router.first_token",  # the first token has arrived, the client has not got it
        "router.streaming",  # the client has got some tokens
    }
)

READ_POINTS = frozenset({"prefill.reading", "prefill.read", "decode.lent", "decode.lending"})
"""Those that only a second turn passes."""

log = logging.getLogger("faults")

_RANK = re.compile(r"rank(\d+):")


@dataclass
class Fault:
    """`action` at the `passage`-th time that `point` is passed."""

    point: str
    passage: int
    action: Action


def for_rank(text: str, rank: int) -> str:
    """The part of KVASIR_FAULT that is for one rank's process, without the prefixes; rank 0's has none."""
    chosen = []
    for entry in filter(None, text.split(",")):
        prefix = _RANK.match(entry.strip())
        if int(prefix[1] if prefix else 0) == rank:
            chosen.append(entry.strip()[prefix.end() if prefix else 0 :])
    return ",".join(chosen)


def parse(text: str) -> list[Fault]:
    """The faults that KVASIR_FAULT names. Raises UserError."""
    faults = []
    for entry in filter(None, text.split(",")):
        where, equals, action = entry.strip().partition("=")
        point, at, passage = where.partition("@")
        if not equals or action not in get_args(Action):
            raise UserError(f"{VARIABLE}: {entry!r} is not POINT[@N]=ACTION, an action of {get_args(Action)}")
        if point not in POINTS:
            raise UserError(f"{VARIABLE}: {point!r} is none of {', '.join(sorted(POINTS))}")
        if at and not (passage.isdecimal() and int(passage)):
            raise UserError(f"{VARIABLE}: {passage!r} is not a number from 1 on")
        faults.append(Fault(point, int(passage or 1), action))  # type: ignore[arg-type]
    return faults


class Faults:
    """Counts passages and acts. Any thread may call it."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._passages: dict[str, int] = {}
        self._closers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        for fault in faults:
            log.warning("fault injection is on point=%s passage=%d action=%s", *vars(fault).values())

    def hit(self, point: str) -> None:
        """This process passes `point`."""
        with self._lock:
            self._passages[point] = passage = self._passages.get(point, 0) + 1
            due = [each.action for each in self._faults if (each.point, each.passage) == (point, passage)]
        for action in due:
            log.warning("fault point=%s passage=%d action=%s", point, passage, action)
            self._act(action)

    @contextlib.contextmanager
    def closable(self, close: Callable[[], None]) -> Iterator[None]:
        """While inside, the action `close` calls `close`, on the thread that passes the point."""
        with self._lock:
            self._closers.append(close)
        try:
            yield
        finally:
            with self._lock:
                self._closers.remove(close)

    def _act(self, action: Action) -> None:
        match action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(70)
            case "close":
                with self._lock:
                    closers = list(self._closers)
                for close in closers:
                    close()


def _nothing(point: str) -> None:
    """This process passes `point`, and no fault waits anywhere."""


def _not_closable(close: Callable[[], None]) -> AbstractContextManager[None]:
    """Nothing closes what is inside."""
    return contextlib.nullcontext()


hit: Callable[[str], None] = _nothing
closable: Callable[[Callable[[], None]], AbstractContextManager[None]] = _not_closable
ON = VARIABLE in os.environ
"""Whether a fault may wait somewhere. Layers are pushed one by one then: what is passed depends on no clock."""
if ON:
    _faults = Faults(parse(for_rank(os.environ[VARIABLE], 0)))
    hit, closable = _faults.hit, _faults.closable
