"""Kubernetes quantities (`500m`, `16Gi`) as numbers. Pure."""

import re
from decimal import Decimal
from typing import Any

QUANTITY = (
    r"^\+?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
"""The pattern of a quantity that is not negative."""

_BINARY = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")
_FACTORS = {suffix: Decimal(1024) ** power for power, suffix in enumerate(_BINARY, 1)} | {
    suffix: Decimal(1000) ** power for power, suffix in enumerate(_DECIMAL, -3)
}


def amount(value: Any) -> Decimal | None:
    """A quantity's value; `None` for what is no quantity."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not re.match(QUANTITY, str(value)):
        return None
    number, suffix = re.fullmatch(r"(.*?)([KMGTPE]i|[numkMGTPE]|)", str(value)).groups()  # type: ignore[union-attr]
    try:
        return Decimal(number) * _FACTORS[suffix]
    except ArithmeticError:  # a hash such as 7e812345 looks like one, and is beyond all numbers
        return None
