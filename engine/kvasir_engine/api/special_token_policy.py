"""The flag for special tokens in clients' texts."""

from typing import Literal, get_args

from kvasir_engine.errors import UserError

ParseSpecial = Literal["none", "prompts", "all"]
"""Where the name of a special token in a client's text is that token: nowhere, in the prompts of completions (for
clients that write their own templates), or in messages too.
"""

PARSE_HELP = (
    "where special tokens in clients' texts are tokens: none, prompts (of completions) or all (messages too)"
)


def parse_special(value: str) -> ParseSpecial:
    """The value of the flag. Raises UserError."""
    for each in get_args(ParseSpecial):
        if value == each:
            return each  # type: ignore[no-any-return]
    raise UserError(f"parse-special-tokens is none, prompts or all, not {value!r}")
