"""Clients that never stop, and what became of each of their requests, by named windows of time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai


@dataclass(frozen=True)
class Answer:
    """One stream: the windows in which it began and ended, and why it is not whole (empty: it is)."""

    begun: str
    ended: str
    seconds: float
    failure: str = ""


@dataclass
class Traffic:
    """Clients that stream completions of a few prompts one after another until they are stopped.

    `connect` makes a client; each thread has its own, which keeps its connections. The first answer to a prompt is
    the reference: an answer that is not the same, token for token, is broken.
    """

    connect: Callable[[], openai.OpenAI]
    model: str
    prompts: list[list[int]]
    tokens: int
    references: dict[int, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    window: str = "start"
    _stop: threading.Event = field(default_factory=threading.Event)
    _open: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def mark(self, window: str) -> None:
        """From now on requests belong to this window."""
        self.window = window

    def counts(self) -> dict[str, int]:
        """Whole answers by the window in which they ended."""
        counts: dict[str, int] = {}
        for answer in list(self.answers):
            if not answer.failure:
                counts[answer.ended] = counts.get(answer.ended, 0) + 1
        return counts

    def earlier(self) -> int:
        """How many streams of earlier windows than this one have not ended."""
        with self._lock:
            return sum(count for window, count in self._open.items() if window != self.window)

    def ask_each(self) -> None:
        """Ask each prompt once, so that there are references of quiet times."""
        for place in range(len(self.prompts)):
            self._ask(place, self.connect())

    def failures(self) -> list[Answer]:
        """The answers that were not whole."""
        return [answer for answer in list(self.answers) if answer.failure]

    @contextmanager
    def flowing(self, clients: int) -> Iterator[None]:
        """Run so many clients meanwhile. Their last requests are finished, not cut off."""
        self._stop.clear()
        threads = [threading.Thread(target=self._run, args=(place,)) for place in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _run(self, place: int) -> None:
        with self.connect() as client:
            while not self._stop.is_set():
                self._ask(place % len(self.prompts), client)
                place += 1

    def _ask(self, place: int, client: openai.OpenAI) -> None:
        begun, since = self.window, time.monotonic()
        with self._lock:
            self._open[begun] = self._open.get(begun, 0) + 1
        try:
            failure = self._stream(place, client)
        except openai.OpenAIError as error:
            failure = f"{type(error).__name__}: {error}"
        with self._lock:
            self._open[begun] -= 1
        self.answers.append(Answer(begun, self.window, time.monotonic() - since, failure))

    def _stream(self, place: int, client: openai.OpenAI) -> str:
        text, finish = "", None
        chunks = client.completions.create(
            model=self.model, prompt=self.prompts[place], max_tokens=self.tokens, temperature=0, stream=True
        )
        for chunk in chunks:
            for choice in chunk.choices:
                text += choice.text
                finish = choice.finish_reason or finish
        with self._lock:
            expected = self.references.setdefault(place, text)
        if finish != "length":
            return f"ended with {finish!r} after {len(text)} characters"
        return "" if text == expected else f"another text: {text!r} instead of {expected!r}"
