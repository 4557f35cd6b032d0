"""The flag for the default white space in constrained JSON."""

from kvasir_engine.errors import UserError

COMPACT = ""
"""The pattern for JSON without white space."""
WHITESPACE_VARIABLE = "KVASIR_JSON_WHITESPACE"
WHITESPACE_HELP = "white space between the parts of constrained JSON, where a request does not say: any or none"


def json_whitespace(value: str) -> str | None:
    """The flag's value as Grammar.whitespace. Raises UserError."""
    if value not in ("any", "none"):
        raise UserError(f"json-whitespace is any or none, not {value!r}")
    return COMPACT if value == "none" else None
