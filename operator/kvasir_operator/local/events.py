"""The events of a supervisor, for its terminal, or through a pipe for the command that started it."""

from collections.abc import Callable

import msgspec

from kvasir_operator.local.state import LocalPodState


class Event(msgspec.Struct, frozen=True, tag_field="event", tag=str.lower):
    """Base of all events."""


class Note(Event, frozen=True):
    """A message for the user."""

    text: str


class Fetching(Event, frozen=True):
    """The model is being fetched. `stage` is download or convert; `total` 0 means unknown."""

    stage: str
    done: int
    total: int


class Fetched(Event, frozen=True):
    """The model is in the cache."""

    seconds: float


class PodChanged(Event, frozen=True):
    """A pod's state has changed."""

    pod: LocalPodState


class Line(Event, frozen=True):
    """A line of a pod's log."""

    pod: str
    text: str


class Ready(Event, frozen=True):
    """All pods are ready for the first time."""

    name: str
    model: str
    url: str
    seconds: float
    auth: bool = False


class Failed(Event, frozen=True):
    """The run has failed, and all pods are stopped. `status` is the exit status."""

    reason: str
    status: int


class Stopping(Event, frozen=True):
    """A graceful stop has begun."""


Any = Note | Fetching | Fetched | PodChanged | Line | Ready | Failed | Stopping
Report = Callable[[Any], None]

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)


def encode(event: Any) -> bytes:
    """Encode the event as a line of JSON."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> Any:
    """Decode an event from its line. Raises msgspec.DecodeError."""
    return _decoder.decode(line)
