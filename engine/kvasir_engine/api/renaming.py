"""Errors in the words of the API that was spoken: bodies of other APIs become chat requests and are checked so."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvasir_engine.api.errors import ApiError


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error with the fields' other names."""
    detail, message, param = error.detail, error.detail.message, error.detail.param
    for ours, theirs in names.items():
        message = message.replace(f"'{ours}'", f"'{theirs}'").replace(f"'{ours}.", f"'{theirs}.")
        if param == ours or (param or "").startswith((f"{ours}.", f"{ours}[")):
            param = theirs + (param or "")[len(ours) :]
    return ApiError(error.status, message, code=detail.code, param=param, type=detail.type)


@contextmanager
def speaking(names: Mapping[str, str]) -> Iterator[None]:
    """What is raised within names fields as `names` has it."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from None
