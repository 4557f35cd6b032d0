"""Errors in the words of the API that was spoken: bodies of other APIs become chat requests and are checked so."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.schemas import ChatRequest

_QUOTED = re.compile(r"'([a-z][a-z0-9_.\[\]]*)'")
_JOINT = re.compile(r"[.\[]")


class Asked(NamedTuple):
    """A body as a chat request, and what the body calls the fields of one."""

    request: ChatRequest
    names: Mapping[str, str]


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error with the fields' other names."""
    detail = error.detail
    message = _QUOTED.sub(lambda found: f"'{_name(found[1], names)}'", detail.message)
    param = None if detail.param is None else _name(detail.param, names)
    return ApiError(error.status, message, code=detail.code, param=param, type=detail.type)


def _name(name: str, names: Mapping[str, str]) -> str:
    """By the longest of `names` that it is, or is a part of."""
    for cut in [len(name), *(found.start() for found in reversed(list(_JOINT.finditer(name))))]:
        other = names.get(name[:cut])
        if other is not None:
            return other + name[cut:]
    return name


@contextmanager
def speaking(names: Mapping[str, str]) -> Iterator[None]:
    """What is raised within names fields as `names` has it."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from None
