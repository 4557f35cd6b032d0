"""The text or messages so far, and the requests that continue them. Pure; forks share it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Gen, Role


@dataclass(frozen=True)
class RoleMessage:
    """A message of a chat."""

    role: Role
    text: str


@dataclass(frozen=True)
class Transcript:
    """Either plain `text`, or `messages`; the last message may be `open`: still being written."""

    text: str = ""
    messages: tuple[RoleMessage, ...] = ()
    open: bool = False

    @property
    def length(self) -> int:
        """The length in characters."""
        return len(self.text) + sum(len(each.text) for each in self.messages)

    @property
    def path(self) -> str:
        """The path of the endpoint that continues it, below `/v1/`."""
        return "chat/completions" if self.messages else "completions"

    def add(self, text: str) -> "Transcript":
        """The transcript with `text` added. Raises ProgramError."""
        if not text:
            return self
        if self.open:
            last = self.messages[-1]
            return replace(self, messages=(*self.messages[:-1], replace(last, text=last.text + text)))
        if self.messages:
            raise ProgramError("text outside of a role: in a program with roles everything is in one")
        return replace(self, text=self.text + text)

    def begin(self, role: Role) -> "Transcript":
        """The transcript with a new open message. Raises ProgramError."""
        if self.open:
            raise ProgramError(f"the role {role} begins within {self.messages[-1].role}, which has not ended")
        if self.text:
            raise ProgramError(f"the role {role} follows plain text: a program has either roles or none")
        return replace(self, messages=(*self.messages, RoleMessage(role, "")), open=True)

    def end(self) -> "Transcript":
        """The transcript with its last message closed. Raises ProgramError."""
        if not self.open:
            raise ProgramError("a role ends that has not begun")
        return replace(self, open=False)

    def body(self) -> dict[str, Any]:
        """The fields of a request that continues it. Raises ProgramError.

        vLLM's `continue_final_message` continues an assistant message that has some text already.
        """
        if not self.messages:
            if not self.text:
                raise ProgramError("there is no text yet that could be continued")
            return {"prompt": self.text}
        last = self.messages[-1]
        if not self.open or last.role != "assistant":
            raise ProgramError(
                "gen and select have their place within the role assistant, or in a program without roles"
            )
        if not last.text:
            if len(self.messages) == 1:
                raise ProgramError("there is no message yet that could be answered")
            return {"messages": _messages(self.messages[:-1])}
        continued = {"add_generation_prompt": False, "continue_final_message": True}
        return {"messages": _messages(self.messages), **continued}


def _messages(messages: tuple[RoleMessage, ...]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.text} for each in messages]


def gen_body(transcript: Transcript, gen: Gen) -> dict[str, Any]:
    """The body of a `gen`'s request, without the model. Raises ProgramError."""
    return {**transcript.body(), **gen.fields, **constraint(transcript.path, gen.regex, gen.choices, gen.schema)}


def constraint(
    path: str,
    regex: str | None = None,
    choices: tuple[str, ...] | None = None,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The request's fields for a constraint: OpenAI's for a schema in a chat, else vLLM's."""
    if regex is not None:
        return {"structured_outputs": {"regex": regex}}
    if choices is not None:
        return {"structured_outputs": {"choice": list(choices)}}
    if schema is None:
        return {}
    if path == "completions":
        return {"structured_outputs": {"json": schema}}
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    }
