"""`kvasir chat` and `kvasir complete`, as they are used in a terminal and in a pipe."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Reply, running_endpoint

from kvasir_engine.client.terminal.conversation import ChatHistory, CommandError, LineJoiner, SavedMessage, shown

KVASIR = str(Path(sys.executable).with_name("kvasir"))


def echoing(path: str, body: dict[str, Any]) -> Reply:
    said = body["prompt"] if path == "completions" else body["messages"][-1]["content"]
    return Reply(["<", said, ">"])


def kvasir(*arguments: str, text: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [KVASIR, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_a_chat_in_a_pipe_keeps_its_history() -> None:
    said = 'one\n"""\ntwo\nlines\n"""\n/system Be kind\nthr\\\nee\n/reset\nfour\n/nonsense\n/exit\nnever\n'
    with running_endpoint(echoing) as stand:
        done = kvasir("chat", stand.url, "--system", "Be short", "--temperature", "0.5", text=said)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["<one>", "<two", "lines>", "Be kind", "<thr", "ee>", "forgotten", "<four>"]
    assert done.stderr.splitlines() == ["kvasir: error: /nonsense is no command; /help shows them"]
    bodies = [body for _, body in stand.calls]
    assert [len(each["messages"]) for each in bodies] == [2, 4, 6, 2]
    assert [each["messages"][0]["content"] for each in bodies] == ["Be short", "Be short", "Be kind", "Be kind"]
    assert bodies[1]["messages"][1:3] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<one>"},
    ]
    assert {each["temperature"] for each in bodies} == {0.5}


def test_a_question_that_failed_is_not_in_the_history() -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "bad":
            return Reply(status=400, error="too long")
        return echoing(path, body)

    with running_endpoint(script) as stand:
        done = kvasir("chat", stand.url, text="bad\ngood\n")
    assert "kvasir: error: http_400: too long" in done.stderr
    assert done.stdout.split() == ["<good>"]
    assert [len(body["messages"]) for _, body in stand.calls] == [1, 1]


def test_complete_continues_an_argument_or_its_input() -> None:
    with running_endpoint(echoing) as stand:
        done = kvasir("complete", "Once", "--url", stand.url, "--stop", "a", "--stop", "b", OPENAI_API_KEY="k")
        piped = kvasir("complete", "--url", stand.url, "--max-tokens", "7", text="upon\n")
        empty = kvasir("complete", "--url", stand.url)
    assert (done.stdout, piped.stdout) == ("<Once>", "<upon\n>")
    assert (stand.calls[0][1]["stop"], stand.calls[1][1]["max_tokens"]) == (["a", "b"], 7)
    assert stand.headers[0]["Authorization"] == "Bearer k"
    assert empty.returncode == 2
    assert empty.stderr == "kvasir: error: there is no prompt, neither as an argument nor on standard input\n"


def test_without_a_url_it_is_the_local_runs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    none = kvasir("complete", "x", KVASIR_STATE=str(tmp_path))
    assert none.returncode == 2
    assert "no URL was given, and nothing is running" in none.stderr
    with running_endpoint(echoing) as stand:
        run = {"name": "mine", "url": stand.url, "ready": True, "supervisor": os.getpid(), "started": None}
        (folder / "state.json").write_text(json.dumps(run))
        assert kvasir("complete", "x", KVASIR_STATE=str(tmp_path)).stdout == "<x>"


def test_an_endpoint_that_is_not_there_is_one_line() -> None:
    for arguments in (["chat", "http://127.0.0.1:9"], ["complete", "x", "--url", "http://127.0.0.1:9"]):
        done = kvasir(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("kvasir: error: http://127.0.0.1:9: connect: ")
        assert done.stderr.count("\n") == 1


def test_the_commands_load_no_server() -> None:
    code = (
        "import sys\n"
        "from kvasir_engine.entrypoints import cli\n"
        "import kvasir.program, kvasir_engine.client.terminal.console, kvasir_engine.client.bench.run\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numba', 'kubernetes', 'kopf'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], [*command])
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60.0) -> None:
        """Read until the pattern is there, and forget what was before its end."""
        ends = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < ends, self.seen
            with contextlib.suppress(OSError):  # the other side is closed: no more comes
                self.seen += os.read(self._fd, 4096).decode()
        self.seen = self.seen[found.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


@contextlib.contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    found = Terminal(*command)
    try:
        yield found
    finally:
        found.close()


def test_ctrl_c_stops_an_answer_and_not_the_chat() -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        last = body["messages"][-1]["content"]
        return Reply(["be", "gun", " never"], hang_after=2) if last == "long" else echoing(path, body)

    with running_endpoint(script) as stand, terminal(KVASIR, "chat", stand.url) as chat:
        chat.until(r"toy at http://127.*/help.*\n")
        chat.until("> ")
        chat.type("long\n")
        chat.until("begun")
        chat.type("\x03")
        chat.until(r"\[stopped\]")
        chat.until("> ")
        chat.type("half a line\x03")
        chat.until("> ")
        chat.type("next\n")
        chat.until("<next>")
        chat.until("> ")
        chat.type("\x04")
        assert chat.end() == 0
    assert [each["content"] for each in stand.calls[1][1]["messages"]] == ["long", "begun", "next"]


# -- the parts


def test_commands_change_the_history(tmp_path: Path) -> None:
    history = ChatHistory("S")
    history.ask("a")
    history.answered("b")
    history.ask("c")
    history.answered("")
    assert [each["content"] for each in history.messages()] == ["S", "a", "b"]
    file = tmp_path / "saved.json"
    history.command(f"/save {file}")
    other = ChatHistory()
    other.command(f"/load {file}")
    assert other == history
    other.command("/undo")
    assert other.said == []
    assert other.command("/system") == "S"
    assert "/save" in other.command("/help")
    other.command("/quit")
    assert other.over


@pytest.mark.parametrize("line", ["/undo", "/save", "/load", "/load /nowhere", "/save /nowhere/x", "/x"])
def test_commands_that_cannot_be_done_say_why(line: str) -> None:
    with pytest.raises(CommandError):
        ChatHistory().command(line)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"role": "tool", "content": "x"}]', '[{"role": "user", "content": "x", "y": 1}]']
)
def test_what_is_no_saved_chat_is_refused_and_changes_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "saved.json"
    file.write_text(content)
    history = ChatHistory("S", [SavedMessage("user", "x")])
    with pytest.raises(CommandError):
        history.command(f"/load {file}")
    assert (history.system, len(history.said)) == ("S", 1)


def test_lines_are_joined() -> None:
    joiner = LineJoiner()
    assert joiner.feed("a") == "a"
    assert [joiner.feed(each) for each in ("a\\", "b")] == [None, "a\nb"]
    assert [joiner.feed(each) for each in ('"""', "/a", "", '"""')] == [None, None, None, "/a\n"]
    assert joiner.feed("a\\") is None
    joiner.drop()
    assert joiner.feed("b") == "b"


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert shown("a\x1b[2Jb\x07\r\n\tc\x9b31m é 漢 \u200d🙂") == "a[2Jb\n\tc31m é 漢 \u200d🙂"
