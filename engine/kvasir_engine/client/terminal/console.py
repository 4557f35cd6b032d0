"""The I/O of `kvasir chat` and `kvasir complete`: the terminal and the endpoint."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from kvasir_engine.client.connection import CallError, EndpointConnection
from kvasir_engine.client.endpoint import EndpointAddress
from kvasir_engine.client.terminal.conversation import ChatHistory, CommandError, LineJoiner, shown
from kvasir_engine.interruptible import run_interruptible

DIM, PLAIN = "\033[2m", "\033[0m"


class ConsoleFailed(Exception):
    """The endpoint cannot be used; the message is one line."""


@dataclass
class Console:
    """Sends questions to an endpoint and writes its streams. `fields` are additional fields of each request."""

    address: EndpointAddress
    model: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    out: TextIO = field(default_factory=lambda: sys.stdout)

    @contextlib.contextmanager
    def open(self) -> Iterator["OpenConsole"]:
        """The console with an open connection. Raises ConsoleFailed."""
        with asyncio.Runner() as runner:
            connection = EndpointConnection(self.address)
            run_interruptible(connection.__aenter__(), runner)
            try:
                model = self.model or run_interruptible(_first_model(connection), runner)
                yield OpenConsole(runner, connection, model, self.fields, self.out)
            finally:
                run_interruptible(connection.__aexit__(), runner)


class OpenConsole:
    """A console with an open connection."""

    def __init__(
        self,
        runner: asyncio.Runner,
        connection: EndpointConnection,
        model: str,
        fields: dict[str, Any],
        out: TextIO,
    ) -> None:
        self.model = model
        self._runner, self._connection, self._fields, self._out = runner, connection, fields, out
        self._bare = out.isatty()

    def ask(self, path: str, asked: dict[str, Any]) -> str:
        """Write the answer as it comes; returns all of it, or the part before Ctrl-C. Raises CallError."""
        pieces: list[str] = []
        body = {"model": self.model, **self._fields, **asked}
        try:
            run_interruptible(self._stream(path, body, pieces), self._runner)
        except KeyboardInterrupt:
            if not self._bare:
                raise
            self._out.write(" [stopped]")
        return "".join(pieces)

    async def _stream(self, path: str, body: dict[str, Any], pieces: list[str]) -> None:
        thinking = False
        async with contextlib.aclosing(self._connection.stream(path, {**body, "stream": True})) as events:
            async for event in events:
                for choice in event.choices[:1]:
                    if choice.thought and self._bare:
                        self._out.write(("" if thinking else DIM) + shown(choice.thought))
                        thinking = True
                    if choice.content:
                        if thinking:
                            self._out.write(PLAIN + "\n")
                            thinking = False
                        pieces.append(choice.content)
                        self._out.write(shown(choice.content) if self._bare else choice.content)
                    self._out.flush()
        if thinking:
            self._out.write(PLAIN)


async def _first_model(connection: EndpointConnection) -> str:
    try:
        names = await connection.models()
    except CallError as error:
        raise ConsoleFailed(f"{connection.address.base}: {error.kind}: {error}") from None
    if not names:
        raise ConsoleFailed(f"{connection.address.base} serves no model")
    return names[0]


def chat(console: Console, history: ChatHistory) -> None:
    """Read questions from standard input and write their answers, until /exit or the end. Raises ConsoleFailed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the editing of lines, by its import alone
    asks = sys.stdin.isatty()
    joiner = LineJoiner()
    with console.open() as opened:
        if asks:
            print(f"{opened.model} at {console.address.base}; /help shows the commands")  # noqa: T201
        while not history.over:
            try:
                line = input(("... " if joiner.within else "> ") if asks else "")
            except EOFError:
                break
            except KeyboardInterrupt:
                joiner.drop()
                print()  # noqa: T201
                if not asks:
                    raise
                continue
            if not joiner.within and line.startswith("/"):
                _command(history, line, console.out)
                continue
            question = joiner.feed(line)
            if question is not None and question.strip():
                _question(opened, history, question, console.out)
    if asks:
        print()  # noqa: T201


def _command(history: ChatHistory, line: str, out: TextIO) -> None:
    try:
        said = history.command(line)
    except CommandError as error:
        sys.stderr.write(f"kvasir: error: {error}\n")
    else:
        out.write(f"{said}\n" if said else "")


def _question(opened: OpenConsole, history: ChatHistory, question: str, out: TextIO) -> None:
    history.ask(question)
    answer = ""
    try:
        answer = opened.ask("chat/completions", {"messages": history.messages()})
    except CallError as error:
        sys.stderr.write(f"\nkvasir: error: {error.kind}: {error}\n")
    finally:
        history.answered(answer)
    out.write("\n")
    out.flush()


def complete(console: Console, prompt: str) -> None:
    """Write a prompt's completion. Raises ConsoleFailed; Ctrl-C ends it."""
    with console.open() as opened:
        try:
            opened.ask("completions", {"prompt": prompt})
        except CallError as error:
            raise ConsoleFailed(f"{error.kind}: {error}") from None
    if console.out.isatty():
        console.out.write("\n")
    console.out.flush()
