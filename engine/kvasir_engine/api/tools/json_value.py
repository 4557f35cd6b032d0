"""Reads one JSON value that stands in a text. Pure."""

from kvasir_engine.api.tools.json_scanner import SPACE, JsonScanner, clean


class ValueReader:
    """Reads a value as it comes, without the whitespace before it."""

    def __init__(self) -> None:
        self.done = False
        self._scanner = JsonScanner()
        self._read: list[str] = []

    def take(self) -> str:
        """What came of the value since it was last asked."""
        text = "".join(self._read)
        self._read.clear()
        return text

    def read(self, text: str) -> str | None:
        """Go on by `text`. What of it is behind the value, or cannot be of it; None while all of it is."""
        for at, character in enumerate(text):
            before = self._scanner.state
            if self._scanner.depth == 0 and before == "value" and character in SPACE:
                continue
            if self._scanner.depth == 0 and before == "value" and character not in "{[":
                return text[at:]
            if not self._scanner.feed(character):
                return text[at:]
            self._read.append(clean(character) if before == "string" else character)
            if self._scanner.state == "done":
                self.done = True
                return text[at + 1 :]
        return None
