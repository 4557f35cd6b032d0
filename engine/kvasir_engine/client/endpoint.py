"""An endpoint's address, and the timeouts of its calls. Pure."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from kvasir_engine.errors import UserError

KEY_VARIABLES = ("KVASIR_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class CallTimeouts:
    """Seconds: to connect, between two bytes of an answer, and for a call as a whole."""

    connect: float = 10.0
    idle: float = 120.0
    total: float = 600.0

    def __post_init__(self) -> None:
        for name in ("connect", "idle", "total"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"a timeout has to be above 0 seconds and finite: {name} is {getattr(self, name)}")


@dataclass(frozen=True)
class EndpointAddress:
    """`base` ends before `/v1`. `key` is sent as a bearer token where there is one."""

    base: str
    key: str = ""

    def url(self, path: str) -> str:
        """The URL of a path below `/v1/`."""
        return f"{self.base}/v1/{path}"


def address_of(url: str, key: str | None = None, environment: Mapping[str, str] = os.environ) -> EndpointAddress:
    """The endpoint at `url`, with or without its `/v1`. Without a given key, the environment's is used.

    Raises UserError.
    """
    try:
        parts = urlsplit(url)
        valid = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in url):
        raise UserError(f"{url!r} is no URL of an endpoint; one looks like http://127.0.0.1:8000")
    if parts.query or parts.fragment:
        raise UserError(f"{url!r} has a query or a fragment; an endpoint's URL ends with its path")
    if key is None:
        key = next((environment[name] for name in KEY_VARIABLES if environment.get(name)), "")
    if not key.isascii() or any(not character.isprintable() for character in key):
        raise UserError("the API key has characters that cannot be in an HTTP header")
    return EndpointAddress(url.rstrip("/").removesuffix("/v1"), key)
