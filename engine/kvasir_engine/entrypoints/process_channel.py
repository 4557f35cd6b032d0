"""Messages between the processes of one `kvasir serve`: one a line, over a socket pair."""

import asyncio
import socket
from typing import Any

import msgspec

from kvasir_engine.api.special_token_policy import ParseSpecial
from kvasir_engine.api.tools.flags import AUTO, Parsers
from kvasir_engine.config import EngineConfig

MOST_LINE = 1 << 20


class ServeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the command line of `kvasir serve` says."""

    config: EngineConfig
    parse_special_tokens: ParseSpecial = "prompts"
    parsers: Parsers = AUTO
    api_keys_file: str = ""
    batch_dir: str = ""
    json_whitespace: str | None = None

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.config.served_model_name or self.config.model


class EngineSetup(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To the engine process: load, and listen at the Unix socket `path`; serve metrics at `metrics`."""

    config: EngineConfig
    path: str
    metrics: str


class ApiSetup(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To an API process: load the tokenizer, and connect to the engine at the Unix socket `engine`.

    It serves its metrics at `metrics`; `others` are those of the other processes.
    """

    options: ServeOptions
    engine: str
    metrics: str
    others: list[str]


class AcceptRequests(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To an API process: accept connections."""


class BecomeUnready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To an API process: be unready."""


class EndProcess(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To either: end now."""


class EngineUnhealthy(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """From the engine process, for the API processes: why it cannot serve; empty if it can."""

    reason: str


class ProcessReady(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """From either: it has loaded what it needs."""


class Inflight(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """From an API process, at each change: the number of requests that have not ended."""

    requests: int


ToChild = EngineSetup | ApiSetup | AcceptRequests | BecomeUnready | EndProcess | EngineUnhealthy
FromChild = ProcessReady | Inflight | EngineUnhealthy

_encode = msgspec.json.Encoder().encode


class ProcessChannel:
    """One end of the pair: sends any message, and receives messages of `kind`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = msgspec.json.Decoder(kind).decode

    @classmethod
    async def over(cls, sock: socket.socket, kind: Any) -> "ProcessChannel":
        """A channel that takes over a connected socket."""
        return cls(*await asyncio.open_connection(sock=sock, limit=MOST_LINE), kind)

    def send(self, message: ToChild | FromChild) -> None:
        """Send in order. Messages to an ended process are dropped."""
        if not self._writer.is_closing():
            self._writer.write(_encode(message) + b"\n")

    async def receive(self) -> Any:
        """The next message. Raises EOFError when the other process has ended."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise EOFError
        return self._decode(line)

    def close(self) -> None:
        self._writer.close()
