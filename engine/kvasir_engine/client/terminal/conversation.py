"""A chat's history and its commands. Pure except for the files that it saves and loads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

HELP = """/system TEXT   set the system prompt; without a text, show it
/reset         forget what was said, but for the system prompt
/undo          forget the last question and its answer
/save FILE     write what was said as JSON messages
/load FILE     go on with what was saved
/help          these lines
/exit          leave; so does Ctrl-D
A text of several lines stands between two lines of \"\"\", or its lines end with \\. Ctrl-C stops an answer."""
FENCE = '"""'
MOST_FILE_BYTES = 64 * 2**20


class CommandError(Exception):
    """A command that cannot be done; the message is one line."""


class SavedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass
class ChatHistory:
    """The system prompt, and the messages after it."""

    system: str = ""
    said: list[SavedMessage] = field(default_factory=list)
    over: bool = False

    def messages(self) -> list[dict[str, str]]:
        """The messages of a request."""
        begin = [SavedMessage("system", self.system)] if self.system else []
        return [{"role": each.role, "content": each.content} for each in [*begin, *self.said]]

    def ask(self, text: str) -> None:
        """Add a question."""
        self.said.append(SavedMessage("user", text))

    def answered(self, text: str) -> None:
        """Add its answer; a question without one is dropped."""
        if text:
            self.said.append(SavedMessage("assistant", text))
        else:
            self.said.pop()

    def command(self, line: str) -> str:
        """Run a line that begins with /; returns what to show. Raises CommandError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/exit" | "/quit":
                self.over = True
                return ""
            case "/help":
                return HELP
            case "/system":
                if rest:
                    self.system = rest
                return self.system or "there is no system prompt"
            case "/reset":
                self.said.clear()
                return "forgotten"
            case "/undo":
                if not self.said:
                    raise CommandError("nothing was said yet")
                while self.said and self.said.pop().role != "user":
                    pass
                return "forgotten"
            case "/save":
                return self._save(Path(_file(name, rest)))
            case "/load":
                return self._load(Path(_file(name, rest)))
        raise CommandError(f"{name} is no command; /help shows them")

    def _save(self, path: Path) -> str:
        messages = self.messages()
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(messages)) + b"\n")
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from None
        return f"{len(messages)} messages are in {path}"

    def _load(self, path: Path) -> str:
        try:
            if path.stat().st_size > MOST_FILE_BYTES:
                raise CommandError(f"{path}: has more than {MOST_FILE_BYTES} bytes")
            messages = msgspec.json.decode(path.read_bytes(), type=list[SavedMessage])
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise CommandError(f"{path}: holds no messages: {error}") from None
        if any(each.role == "system" for each in messages[1:]):
            raise CommandError(f"{path}: has a system message that is not the first")
        first = messages[0] if messages and messages[0].role == "system" else None
        self.system = first.content if first else ""
        self.said = messages[1:] if first else messages
        return f"{len(messages)} messages are loaded"


def _file(name: str, rest: str) -> str:
    if not rest:
        raise CommandError(f"{name} needs a file")
    return rest


class LineJoiner:
    """Joins lines to whole questions."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._fenced = False

    @property
    def within(self) -> bool:
        """Whether the question continues on more lines."""
        return self._fenced or bool(self._lines)

    def drop(self) -> None:
        """Drop the lines of an incomplete question."""
        self._lines, self._fenced = [], False

    def feed(self, line: str) -> str | None:
        """The question that this line completes, or None."""
        if line.strip() == FENCE:
            self._fenced = not self._fenced
            return None if self._fenced else self._whole()
        if not self._fenced and line.endswith("\\"):
            self._lines.append(line[:-1])
            return None
        self._lines.append(line)
        return None if self._fenced else self._whole()

    def _whole(self) -> str:
        text = "\n".join(self._lines)
        self._lines = []
        return text


def shown(text: str) -> str:
    """A model's text without control characters, which could control the terminal."""
    return "".join(each for each in text if each in "\n\t" or each.isprintable() or each in _JOINERS)


_JOINERS = "\u200c\u200d\u00ad"
