"""A container's log file, with rotation (one old file is kept) and the last lines for a termination message."""

from collections import deque
from pathlib import Path

ROTATE_BYTES = 16 << 20
LINE_BYTES = 64 << 10
ERROR = "kvasir: error:"
_MESSAGE_LINES = 10
_MESSAGE_CHARS = 2048


class LogFile:
    """Appends lines to `path`; at `ROTATE_BYTES` the file becomes `path.1` and a new one begins."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._tail: deque[str] = deque(maxlen=_MESSAGE_LINES)

    def write(self, line: str) -> None:
        """Append one line, given without its newline."""
        data = line.encode(errors="replace") + b"\n"
        if self._size + len(data) > ROTATE_BYTES and self._size:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)
        self._tail.append(line)

    def begin(self) -> None:
        """Note that a new instance of the container starts: earlier lines are not part of its termination
        message."""
        self._tail.clear()

    def message(self) -> str:
        """The termination message from the log: the last `kvasir: error:` line, else the last lines."""
        for line in reversed(self._tail):
            if line.startswith(ERROR):
                return line[:_MESSAGE_CHARS]
        return "\n".join(self._tail)[-_MESSAGE_CHARS:]

    def close(self) -> None:
        """Close the file. May be called several times."""
        self._file.close()
