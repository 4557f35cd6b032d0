"""What was said so far, and the requests that continue it. Pure; forks share it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Gen, Role


@dataclass(frozen=True)
class Said:
    """A message."""

    role: Role
    text: str


@dataclass(frozen=True)
class Transcript:
    """Either plain `text`, or `messages`, of which the last may still be `open`."""

    text: str = ""
    messages: tuple[Said, ...] = ()
    open: bool = False

    @property
    def length(self) -> int:
        """In characters."""
        return len(self.text) + sum(len(each.text) for each in self.messages)

    @property
    def path(self) -> str:
        """Of the endpoint that continues it, below `/v1/`."""
        return "chat/completions" if self.messages else "completions"

    def add(self, text: str) -> "Transcript":
        """With `text` at its end. Raises ProgramError."""
        if not text:
            return self
        if self.open:
            last = self.messages[-1]
            return replace(self, messages=(*self.messages[:-1], replace(last, text=last.text + text)))
        if self.messages:
            raise ProgramError("text outside of a role: in a program with roles everything is in one")
        return replace(self, text=self.text + text)

    def begin(self, role: Role) -> "Transcript":
        """With a new message. Raises ProgramError."""
        if self.open:
            raise ProgramError(f"the role {role} begins within {self.messages[-1].role}, which has not ended")
        if self.text:
            raise ProgramError(f"the role {role} follows plain text: a program has either roles or none")
        return replace(self, messages=(*self.messages, Said(role, "")), open=True)

    def end(self) -> "Transcript":
        """With its last message closed. Raises ProgramError."""
        if not self.open:
            raise ProgramError("a role ends that has not begun")
        return replace(self, open=False)

    def body(self) -> dict[str, Any]:
        """The fields of a request that continues it. Raises ProgramError.

        A turn that has some text already is continued by vLLM's `continue_final_message`.
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


def _messages(messages: tuple[Said, ...]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.text} for each in messages]


def gen_body(transcript: Transcript, gen: Gen) -> dict[str, Any]:
    """The request of a `gen`, but for the model. Raises ProgramError."""
    return {**transcript.body(), **gen.fields, **constraint(transcript.path, gen.regex, gen.choices, gen.schema)}


def constraint(
    path: str,
    regex: str | None = None,
    choices: tuple[str, ...] | None = None,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields that hold the model to a form: OpenAI's for a schema in a chat, else vLLM's."""
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
