"""The origin of a request."""

from dataclasses import dataclass

CALLER = "kvasir.caller"  # scope key: who asks, where this process does so itself


@dataclass(frozen=True)
class Caller:
    """The origin of a request. `salt` is the tenant's; `behind`: levels of priority after other requests.

    Requests `in_background` are not timed: nobody waits for their first token.
    """

    salt: str
    behind: int = 0
    in_background: bool = False
