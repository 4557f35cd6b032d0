"""What white space constrained JSON may have where a request does not say, as the command line says it."""

from kvasir_engine.errors import UserError

COMPACT = ""
"""The white space of JSON without any."""
WHITESPACE_VARIABLE = "KVASIR_JSON_WHITESPACE"
WHITESPACE_HELP = "white space between the parts of constrained JSON, where a request does not say: any or none"


def json_whitespace(value: str) -> str | None:
    """The value of the flag, as Grammar.whitespace has it. Raises UserError."""
    if value not in ("any", "none"):
        raise UserError(f"json-whitespace is any or none, not {value!r}")
    return COMPACT if value == "none" else None
