"""The process that renders chat templates, with little time and memory: a model's author wrote them.

Reads requests from stdin and answers on stdout, each a length of four bytes and as much JSON. It ends at the end of
stdin.
"""

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

HEADER = struct.Struct("<I")


class _OutOfTime(BaseException):
    pass


def read(stream: BinaryIO) -> Any:
    """The next message, or `None` at the end."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    return json.loads(stream.read(HEADER.unpack(head)[0]))


def write(stream: BinaryIO, message: Any) -> None:
    """Send one message."""
    data = json.dumps(message).encode()
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def _render(request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, request["seconds"])
        try:
            rendered, _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                tools=request["tools"],
                **request["options"],
                **request["variables"],
            )
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _OutOfTime:
        return {"costly": f"it takes longer than {request['seconds']:g} s"}
    except MemoryError:
        return {"costly": "it takes too much memory"}
    except Exception as error:  # whatever the template does
        return {"refused": (str(error) or type(error).__name__)[:1000]}
    text: str = rendered[0]
    if len(text) > request["characters"]:
        return {"costly": f"it writes more than {request['characters']} characters"}
    return {"text": text}


def allow_memory(more: int) -> None:
    """Limit the growth of the process's address space to `more` bytes from now on."""
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def main() -> None:
    """Serve until stdin ends. `argv`: bytes of memory beyond what the libraries take."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # seconds and hundreds of MB for nothing
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template(conversations=[[]], chat_template="")  # what is imported at the first use
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allow_memory(int(sys.argv[1]))

    def out_of_time(*_: object) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGVTALRM, out_of_time)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is its parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints is an answer
    while (request := read(sys.stdin.buffer)) is not None:
        try:
            write(answers, _render(request))
        except _OutOfTime:  # a tick late
            write(answers, {"costly": "it takes too long"})


if __name__ == "__main__":
    main()
