"""What pods say of themselves over HTTP: an edge. A pod that does not answer is nobody's error."""

import httpx
import msgspec

from kvasir_operator.plan.preload import Progress
from kvasir_operator.render.pod import PORT

TIMEOUT_SECONDS = 2.0


class PodReader:
    """Asks pods by their addresses. Blocking, for use in threads."""

    def __init__(self, client: httpx.Client | None = None) -> None:
        # No proxy of the environment: pods are in the cluster.
        self._client = client or httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)

    def progress(self, ip: str) -> Progress | None:
        """How far the Job's pod at `ip` is, or `None`."""
        host = f"[{ip}]" if ":" in ip else ip
        try:
            answer = self._client.get(f"http://{host}:{PORT}/progress")
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=Progress)
        except (httpx.HTTPError, msgspec.DecodeError):
            return None
