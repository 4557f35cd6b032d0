"""A conversation of another API as a chat's messages, and what the chat's fields are called there. Pure."""

from dataclasses import dataclass, field

from kvasir_engine.api.schemas import CalledFunction, ChatMessage, MessageToolCall


@dataclass
class OpenTurn:
    """One message, while its parts come."""

    role: str
    tool_call_id: str | None = None
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[MessageToolCall] = field(default_factory=list)

    def message(self) -> ChatMessage:
        """What a chat would have been asked with."""
        return ChatMessage(
            self.role,
            "\n".join(self.texts) if self.texts or not self.calls else None,
            tool_calls=self.calls or None,
            tool_call_id=self.tool_call_id,
            reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
        )


class Turns:
    """Gathers messages in order. `names` has the other API's name of each message and call."""

    def __init__(self, field: str) -> None:
        self.names: dict[str, str] = {"messages": field}
        self._field = field
        self._turns: list[OpenTurn] = []

    @property
    def last(self) -> OpenTurn | None:
        """The one that the next part may belong to."""
        return self._turns[-1] if self._turns else None

    def begin(self, role: str, at: str, tool_call_id: str | None = None) -> OpenTurn:
        """The next message; `at` is where its first part is."""
        self.names[f"messages[{len(self._turns)}]"] = at
        self._turns.append(OpenTurn(role, tool_call_id))
        return self._turns[-1]

    def of(self, role: str, at: str) -> OpenTurn:
        """The last message if it is of this role, or the next."""
        last = self.last
        return last if last is not None and last.role == role else self.begin(role, at)

    def call(self, at: str, id: str, name: str, arguments: str) -> str:
        """The assistant calls a function. The call's own name in a chat."""
        turn = self.of("assistant", at)
        message = f"messages[{len(self._turns) - 1}]"
        call = f"{message}.tool_calls[{len(turn.calls)}]"
        turn.calls.append(MessageToolCall(id, CalledFunction(name, arguments)))
        self.names |= {f"{message}.tool_calls": self._field, call: at, f"{call}.function": at}
        return call

    def result(self, at: str, id: str, text: str) -> str:
        """What a call gave. The message's own name in a chat."""
        self.begin("tool", at, id).texts.append(text)
        return f"messages[{len(self._turns) - 1}]"

    def messages(self) -> list[ChatMessage]:
        """All of them."""
        return [turn.message() for turn in self._turns]
