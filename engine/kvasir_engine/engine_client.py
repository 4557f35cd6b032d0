"""The one interface between the OpenAI front end and whatever generates tokens.

Two implementations exist: the engine in this process (`core/inprocess_client.py`) and the router's pool of
workers (`router/client.py`). The front end (`api/`) knows only this module.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from kvasir_engine.protocol import PromptLogprobs, Sampling, TokenLogprobs


class EngineError(Exception):
    """A request failed with a name.

    `code` is a stable snake_case word (for example `context_length_exceeded`, `no_worker`,
    `kv_digest_mismatch`, `overloaded`); `status` is the HTTP status that the front end answers with.
    """

    def __init__(self, code: str, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


class GenerateRequest(msgspec.Struct, frozen=True):
    """One sequence to continue. `tokens` is the whole prompt as token ids, never empty.

    `salt` separates cache identities: requests with different salts never share KV. Requests of a lower `priority`
    are served first (vLLM's sense): each level is worth as many places in the queue as `engine.LEVEL` says.
    """

    id: str
    tokens: list[int]
    sampling: Sampling
    salt: str = ""
    priority: int = 0


class Output(msgspec.Struct, frozen=True):
    """The next tokens of a sequence, in order, none twice and none missing.

    `finish_reason` is `None` until the last output, then `stop` (a stop token, which is the last of
    `tokens`) or `length`. `cached_tokens` is how many prompt tokens came from a cache, or -1 until the
    first token is known. Where they are asked for, the first output with tokens has all `prompt_logprobs`: one for
    each of the prompt's tokens but the first, or for those from place `logprob_start` on.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    cached_tokens: int = -1
    prompt_logprobs: list[PromptLogprobs] | None = None


class EngineClient(Protocol):
    """Generates tokens for the front end."""

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and output together, that one sequence may have; 0 while not known."""
        ...

    def unready_reason(self) -> str | None:
        """Why no request can be served at this moment, or `None` when one can."""
        ...

    async def wait_ready(self) -> str | None:
        """Return `None` once a request can be served, or why none will be soon."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Yield the continuation of `request`. Closing the generator aborts the request.

        The last output has the finish reason. Raises EngineError.
        """
        ...
