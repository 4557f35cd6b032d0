"""Shows a run in a terminal: progress while it starts, then the pods' logs."""

import shlex
import time

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvasir_operator.local import events
from kvasir_operator.local.state import LocalPodState, RunState

_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
_STATE_COLORS = {"ready": "green", "crashed": "red", "not ready": "yellow"}


class Terminal(Console):
    """A console that stops writing when its reader is gone."""

    def on_broken_pipe(self) -> None:
        """Continue the run, whose logs are on disk too."""
        self.quiet = True


class View:
    """Shows events. On a terminal progress is redrawn in place; elsewhere every change is a line."""

    def __init__(self, console: Console, logs: bool) -> None:
        self._console = console
        self._logs = logs
        self._begun = time.monotonic()
        self._colors: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._tenth = -1
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._progress.start()

    def close(self) -> None:
        """Restore the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __call__(self, event: events.Any) -> None:
        """Show one event."""
        match event:
            case events.Note():
                self._say(f"note: {event.text}", "yellow")
            case events.Fetching():
                self._fetching(event)
            case events.Fetched():
                self._drop("model")
                self._say(f"model is in the cache ({event.seconds:.1f} s)")
            case events.PodChanged():
                self._pod(event.pod)
            case events.Line() if self._logs:
                prefix = Text(event.pod, style=self._color(event.pod))
                self._console.print(prefix, Text("|", style="dim"), Text.from_ansi(event.text), soft_wrap=True)
            case events.Ready():
                self.close()
                self._ready(event)
            case events.Stopping():
                self._say("stopping; Ctrl-C again kills")
            case events.Failed():
                self.close()

    def _say(self, text: str, style: str = "bold") -> None:
        self._console.print(Text(f"kvasir: {text}", style=style), soft_wrap=True)

    def _color(self, pod: str) -> str:
        return self._colors.setdefault(pod, _COLORS[len(self._colors) % len(_COLORS)])

    def _fetching(self, event: events.Fetching) -> None:
        if self._progress is not None:
            task = self._task("model", "model")
            total = event.total or None
            percent = f" {event.done * 100 // total}%" if total else ""
            self._progress.update(task, state=event.stage + percent)
            return
        tenth = event.done * 10 // event.total if event.total else 0
        if (event.stage, tenth) != (self._stage, self._tenth):
            self._stage, self._tenth = event.stage, tenth
            self._say(f"model: {event.stage}{f' {tenth * 10}%' if event.total else ''}")

    def _pod(self, pod: LocalPodState) -> None:
        before = self._states.get(pod.name)
        shown = f"{pod.state} {pod.message}".strip()
        if shown == before or (before is None and pod.state == "pending"):
            return
        self._states[pod.name] = shown
        if self._progress is not None:
            task = self._task(pod.name, Text(pod.name, style=self._color(pod.name)).markup)
            self._progress.update(task, state=pod.state, completed=int(pod.ready), total=1)
        if pod.state in ("ready", "crashed", "ended") or self._progress is None:
            ready = pod.state == "ready"
            after = f" ({time.monotonic() - self._begun:.1f} s)" if ready else ""
            restarts = f", restart {pod.restarts}" if pod.restarts and not ready else ""
            message = f": {pod.message}" if pod.message else ""
            style = _STATE_COLORS.get(pod.state, "default")
            self._say(f"{pod.name} is {pod.state}{restarts}{message}{after}", style)

    def _task(self, key: str, label: str) -> TaskID:
        assert self._progress is not None
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(label, total=None, state="")
        return self._tasks[key]

    def _drop(self, key: str) -> None:
        if self._progress is not None and key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))

    def _ready(self, event: events.Ready) -> None:
        message = {"role": "user", "content": "What is the capital of France?"}
        question = {"model": event.model, "messages": [message], "temperature": 0}
        body = msgspec.json.encode(question).decode()
        auth = ' -H "Authorization: Bearer $API_KEY"' if event.auth else ""
        self._say(f"{event.name} is ready at {event.url}/v1 ({event.seconds:.1f} s)", "bold green")
        line = (
            f"curl {event.url}/v1/chat/completions -H 'Content-Type: application/json'{auth} -d {shlex.quote(body)}"
        )
        self._console.print(Text(line), soft_wrap=True)


def table(run: RunState) -> Table:
    """A run's pods as a table, in which only the state's message may wrap."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("POD", "ROLE", "READY", "STATE", "RESTARTS", "PID", "ADDRESS"):
        found.add_column(column, no_wrap=column != "STATE")
    for pod in run.pods:
        state = Text(f"{pod.state}{f': {pod.message}' if pod.message else ''}", _STATE_COLORS.get(pod.state, ""))
        ready = "yes" if pod.ready else "no"
        found.add_row(pod.name, pod.role, ready, state, str(pod.restarts), str(pod.pid or ""), pod.address)
    return found


def sizes(run: RunState) -> str:
    """The ready and all workers of each role. A worker over several pods counts once, and is ready if all of them
    are."""
    ready: dict[str, dict[str, bool]] = {}
    for pod in run.pods:
        workers = ready.setdefault(pod.role, {})
        workers[pod.group or pod.name] = workers.get(pod.group or pod.name, True) and pod.ready
    return "  ".join(f"{role} {sum(workers.values())}/{len(workers)}" for role, workers in ready.items())
