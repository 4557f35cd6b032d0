"""API keys, and the cache tenant of each key."""

import logging
import time
from hashlib import blake2b
from pathlib import Path

from kvasir_engine.api.errors import ApiError
from kvasir_engine.errors import UserError

log = logging.getLogger("api")

_REREAD_SECONDS = 2.0


def tenant_salt(key: str) -> str:
    """A salt that separates a key's cached KV from other keys'; it reveals nothing about the key."""
    return blake2b(key.encode(), digest_size=16, person=b"kvasir-tenant").hexdigest()


def salt_within(salt: str, cache_salt: str) -> str:
    """The salt of a tenant's requests that share a `cache_salt`; no other tenant can have it."""
    if not cache_salt:
        return salt
    return blake2b(f"{salt}/{cache_salt}".encode(), digest_size=16, person=b"kvasir-salt").hexdigest()


def read_keys(path: Path) -> frozenset[str]:
    """The keys of a file, one a line, or of a directory with a file a key, as a mounted Secret. Raises OSError.

    Names that begin with a dot are skipped: Kubernetes keeps a Secret's versions under such names.
    """
    files = [path]
    if path.is_dir():
        files = [each for each in path.iterdir() if not each.name.startswith(".") and each.is_file()]
    lines = [line.strip() for each in files for line in each.read_text().splitlines()]
    return frozenset(line for line in lines if line)


class ApiKeys:
    """The valid API keys. The file is read again while running, so that a rotated Secret needs no restart.

    Raises UserError when `path` cannot be read at the start. If it cannot be read later, or is empty, all requests
    are refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at = time.monotonic()
        try:
            self._salts = {key: tenant_salt(key) for key in read_keys(path)}
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the API keys in {path}: {error}") from error

    def _reread(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _REREAD_SECONDS:
            return
        self._read_at = now
        try:
            self._salts = {key: tenant_salt(key) for key in read_keys(self._path)}
        except (OSError, ValueError) as error:
            log.error("cannot read the API keys, nobody is let in path=%s reason=%r", self._path, str(error))
            self._salts = {}

    def salt(self, authorization: str | None) -> str:
        """The tenant's salt for an `Authorization` header. Raises ApiError, 401."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise ApiError(
                401,
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            )
        self._reread()
        salt = self._salts.get(key)
        if salt is None:
            shown = f"{key[:3]}***{key[-2:]}" if len(key) > 8 else "***"
            raise ApiError(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")
        return salt
