"""Fault points, for tests only: they make a process die, stop or close its connections at one step of the protocol.

`KVASIR_FAULT` holds entries `POINT[@N]=ACTION`, separated by commas: `prefill.pushed_chunk@2=kill` sends SIGKILL to
this process when it passes that point for the second time. An entry with the prefix `rankN:` applies to the process
of the worker's rank N. The variable is read once, at import. Without it `hit` and `closable` do nothing, and
nothing can switch them on later.
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
        "prefill.all_written",  # all pages are written, Complete is not sent yet
        "prefill.read_posted",  # a read of a decode worker's pages is posted
        "prefill.read_done",  # the pages are here and correct, the decode worker does not know yet
        "prefill.completed",  # Complete is sent, the router does not know yet
        "decode.reserved",  # a reservation has arrived
        "decode.pages_lent",  # pages are lent to the prefill worker, the router does not know yet
        "decode.loan_digested",  # their digests are known, the prefill worker's rank does not know them yet
        "decode.leased",  # pages are leased, the router does not know yet
        "decode.pages_written",  # some pages are announced, they are not verified yet
        "decode.kv_complete",  # all KV is here and verified, and the first token is known
        "decode.first_step",  # the first token is computed from received KV
        "router.reserved",  # Reserve is sent
        "router.leased",  # the lease has arrived, the prompt is not sent yet
        "router.submitted",  # the prompt and lease are sent to prefill
        "router.first_token",  # the first token has arrived, the client does not have it yet
        "router.streaming",  # the client has some tokens
    }
)

READ_POINTS = frozenset({"prefill.read_posted", "prefill.read_done", "decode.pages_lent", "decode.loan_digested"})
"""Points that only the second turn of a conversation passes: its prompt reads pages of a decode worker."""

log = logging.getLogger("faults")

_RANK = re.compile(r"rank(\d+):")


@dataclass
class Fault:
    """An `action` when a process passes `point` for the `passage`-th time."""

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
        """Within this context the action `close` calls `close`, on the thread that passes the point."""
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
    """Do nothing: no faults are set."""


def _not_closable(close: Callable[[], None]) -> AbstractContextManager[None]:
    """Do nothing: no faults are set."""
    return contextlib.nullcontext()


hit: Callable[[str], None] = _nothing
closable: Callable[[Callable[[], None]], AbstractContextManager[None]] = _not_closable
ON = VARIABLE in os.environ
"""Whether faults are set. Then layers are pushed one by one, so that which points are passed depends on no
clock."""
if ON:
    _faults = Faults(parse(for_rank(os.environ[VARIABLE], 0)))
    hit, closable = _faults.hit, _faults.closable
