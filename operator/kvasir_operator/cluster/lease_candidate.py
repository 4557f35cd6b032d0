"""PURE: leader election by a Lease: one candidate's machine. It is told records and times, and says what to write.

No clock of another machine is trusted: a record counts as expired once this candidate has seen it unchanged for its
whole duration (the rule of client-go's leaderelection). A leader leads for `fence` seconds from when it began the
renewal that succeeded, which is less than `duration`: it stops before anybody can have taken the Lease.

    leader      |-- renewal begins ---- leads for `fence` ----|  stops by its own clock
    Lease             |-- written
    candidate            |-- sees it ------- `duration` ---------------|  may take it
"""

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """Seconds. `fence` < `duration`: the difference is what a write may take after the client gave it up."""

    duration: int = 15
    fence: float = 10.0
    retry: float = 2.0


class Record(msgspec.Struct, frozen=True):
    """A Lease's record. `holder` "" is nobody, `version` the resourceVersion; times are as the holder wrote."""

    holder: str
    duration: int
    acquired: str
    renewed: str
    transitions: int = 0
    version: str = ""


class LeaseCandidate:
    """One replica's view of the election. Times are seconds of its own monotonic clock."""

    def __init__(self, identity: str, timing: Timing | None = None) -> None:
        self.identity = identity
        self.timing = timing or Timing()
        self._until = float("-inf")
        self._version: str | None = None
        self._since = 0.0

    def left(self, now: float) -> float:
        """For how many seconds this replica still leads; 0 or less: it does not."""
        return self._until - now

    def proposal(self, record: Record | None, now: float, stamp: str) -> Record | None:
        """What to write, given what was read by `now`; `None`: another replica leads. `stamp`: the time written."""
        if record is None:
            return Record(self.identity, self.timing.duration, stamp, stamp)
        if record.holder == self.identity:
            return Record(
                record.holder, self.timing.duration, record.acquired, stamp, record.transitions, record.version
            )
        self._until = float("-inf")  # whatever this replica believed, the Lease is another's
        if record.version != self._version:
            self._version, self._since = record.version, now
        if record.holder and now - self._since < record.duration:
            return None
        return Record(self.identity, self.timing.duration, stamp, stamp, record.transitions + 1, record.version)

    def written(self, started: float) -> None:
        """The proposal was written; the attempt began (before its read) at `started`."""
        self._until = max(self._until, started + self.timing.fence)

    def resignation(self, record: Record | None, stamp: str) -> Record | None:
        """What to write to hand over at once; this replica no longer leads from here on."""
        self._until = float("-inf")
        if record is None or record.holder != self.identity:
            return None
        return Record("", 1, record.acquired, stamp, record.transitions, record.version)
