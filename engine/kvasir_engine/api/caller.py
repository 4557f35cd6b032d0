"""Who asks for something."""

from dataclasses import dataclass

CALLER = "kvasir.caller"  # scope key: who asks, where this process does so itself


@dataclass(frozen=True)
class Caller:
    """Whose request it is. `salt` is the tenant's; `behind`: so many levels of priority after others' requests.

    What is asked `in_background` is not timed: nobody waits for its first token.
    """

    salt: str
    behind: int = 0
    in_background: bool = False
