"""Converts a conversation of another API to chat messages, and maps the names of fields. Pure."""

from dataclasses import dataclass, field

from kvasir_engine.api.schemas import CalledFunction, ChatMessage, MessageToolCall


@dataclass
class OpenTurn:
    """One message while its parts are added."""

    role: str
    tool_call_id: str | None = None
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[MessageToolCall] = field(default_factory=list)

    def message(self) -> ChatMessage:
        """The chat message."""
        return ChatMessage(
            self.role,
            "\n".join(self.texts) if self.texts or not self.calls else None,
            tool_calls=self.calls or None,
            tool_call_id=self.tool_call_id,
            reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
        )


class Turns:
    """Collects messages in order. `names` has the other API's name of each message and call."""

    def __init__(self, field: str) -> None:
        self.names: dict[str, str] = {"messages": field}
        self._field = field
        self._turns: list[OpenTurn] = []

    @property
    def last(self) -> OpenTurn | None:
        """The message to which the next part may belong."""
        return self._turns[-1] if self._turns else None

    def begin(self, role: str, at: str, tool_call_id: str | None = None) -> OpenTurn:
        """Begin the next message; `at` is the name of its first part."""
        self.names[f"messages[{len(self._turns)}]"] = at
        self._turns.append(OpenTurn(role, tool_call_id))
        return self._turns[-1]

    def of(self, role: str, at: str) -> OpenTurn:
        """The last message if it has this role, or a new one."""
        last = self.last
        return last if last is not None and last.role == role else self.begin(role, at)

    def call(self, at: str, id: str, name: str, arguments: str) -> str:
        """Add a call of a function by the assistant. Returns the call's name in the chat."""
        turn = self.of("assistant", at)
        message = f"messages[{len(self._turns) - 1}]"
        call = f"{message}.tool_calls[{len(turn.calls)}]"
        turn.calls.append(MessageToolCall(id, CalledFunction(name, arguments)))
        self.names |= {f"{message}.tool_calls": self._field, call: at, f"{call}.function": at}
        return call

    def result(self, at: str, id: str, text: str) -> str:
        """Add a call's result. Returns the message's name in the chat."""
        self.begin("tool", at, id).texts.append(text)
        return f"messages[{len(self._turns) - 1}]"

    def messages(self) -> list[ChatMessage]:
        """All messages."""
        return [turn.message() for turn in self._turns]
