"""Checks ranges and lengths of parameters; each error names the field, in OpenAI's words."""

from kvasir_engine.api.errors import bad_request


def shown_number(value: float) -> str:
    """A number for a message; of a number with hundreds of digits, the first ones."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else f"a number of about {value.bit_length() * 0.30103:.0f} digits"
    return f"{value:g}"


def within(name: str, value: float, low: float, high: float) -> None:
    got = shown_number(value)
    if value != value or value < low:
        raise bad_request(
            f"Invalid value for '{name}': expected a value >= {shown_number(low)}, but got {got} instead.",
            name,
            "decimal_below_min_value" if isinstance(value, float) else "integer_below_min_value",
        )
    if value > high:
        raise bad_request(
            f"Invalid value for '{name}': expected a value <= {shown_number(high)}, but got {got} instead.",
            name,
            "decimal_above_max_value" if isinstance(value, float) else "integer_above_max_value",
        )


def short(name: str, text: str | None, most: int) -> None:
    if text is not None and len(text) > most:
        raise bad_request(
            f"Invalid '{name}': string too long. Expected a string with maximum length {most}, "
            f"but got a string with length {len(text)} instead.",
            name,
            "string_above_max_length",
        )


def few(name: str, length: int, most: int) -> None:
    if length > most:
        raise bad_request(
            f"Invalid '{name}': array too long. Expected an array with maximum length {most}, "
            f"but got an array with length {length} instead.",
            name,
            "array_above_max_length",
        )
