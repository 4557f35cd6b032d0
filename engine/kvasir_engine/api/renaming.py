"""Other APIs' bodies become chat requests; errors of those name the fields as the client's API does."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.schemas import ChatRequest

_QUOTED = re.compile(r"'([a-z][a-z0-9_.\[\]]*)'")
_JOINT = re.compile(r"[.\[]")


class RenamedRequest(NamedTuple):
    """A body as a chat request, and the body's name of each of the chat request's fields."""

    request: ChatRequest
    names: Mapping[str, str]


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error, with the fields named by `names`."""
    detail = error.detail
    message = _QUOTED.sub(lambda found: f"'{_name(found[1], names)}'", detail.message)
    param = None if detail.param is None else _name(detail.param, names)
    return ApiError(error.status, message, code=detail.code, param=param, type=detail.type)


def _name(name: str, names: Mapping[str, str]) -> str:
    """`name` renamed by the longest of `names` that it equals or begins with."""
    for cut in [len(name), *(found.start() for found in reversed(list(_JOINT.finditer(name))))]:
        other = names.get(name[:cut])
        if other is not None:
            return other + name[cut:]
    return name


@contextmanager
def renaming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that are raised within name the fields by `names`."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from None
