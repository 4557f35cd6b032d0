"""No task and no thread ends unseen: each that is killed ends its connection or its process, and says so."""

import ast
import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from wire_harness import ToyWorker, receive_frame, router_of, running_workers

from kvasir_engine.core.inprocess_client import InProcessClient
from kvasir_engine.engine_client import EngineError, GenerateRequest
from kvasir_engine.protocol import Sampling, Submit, encode
from kvasir_engine.supervisor import ExpectedEnd, Supervisor, start_thread

ROOT = Path(__file__).parents[2]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

# Tasks and threads that their own function waits for, or whose end somebody else hears of; by file and function.
AWAITED = {
    ("engine/kvasir_engine/supervisor.py", "start"): "the supervisor",
    ("engine/kvasir_engine/supervisor.py", "start_thread"): "the supervisor",
    ("engine/kvasir_engine/api/http_responses.py", "_unless_client_leaves"): "awaited by the request",
    ("engine/kvasir_engine/api/http_responses.py", "while_client_stays"): "awaited by the request",
    ("engine/kvasir_engine/api/generation.py", "_run_several"): "each says its end to the request's queue",
    ("engine/kvasir_engine/api/batch/runner.py", "_start_more"): "a task group; each logs its end",
    ("engine/kvasir_engine/api/batch/runner.py", "_work"): "awaited there; it logs what fails and goes on",
    ("engine/kvasir_engine/api/batch/runner.py", "_until_over"): "awaited there",
    ("engine/kvasir_engine/api/batch/runner.py", "_ask_all"): "awaited there, and a task group",
    ("engine/kvasir_engine/api/http/server.py", "serve_until"): "awaited there",
    ("engine/kvasir_engine/api/http/acceptor.py", "_accept"): "logs what ends it, and closes its connection",
    (
        "engine/kvasir_engine/core/engine_thread.py",
        "EngineThread",
    ): "says its end to every session and to the process",
    ("engine/kvasir_engine/connector/transfer_thread.py", "TransferThread"): "says its end to the process",
    ("engine/kvasir_engine/executor/node_listener.py", "_hear"): "cancelled there; it closes one socket",
    ("engine/kvasir_engine/client/bench/load.py", "run"): "a task group",
    ("engine/kvasir/program/function.py", "_arun_all"): "a task group",
    (
        "engine/kvasir/program/state_executor.py",
        "append",
    ): "its end fails all variables and snapshots that wait",
    ("operator/kvasir_operator/controller.py", "run"): "an end stops the operator, with its error",
    ("operator/kvasir_operator/reconcile/work_queue.py", "add"): "an error is logged there, and its key comes back",
    ("operator/kvasir_operator/reconcile/bounded_http.py", "_get_all"): "awaited there",
    ("operator/kvasir_operator/local/proxy.py", "connection_made"): "ends its client's connection",
    ("operator/kvasir_operator/local/supervisor.py", "_fetch"): "awaited there",
    ("operator/kvasir_operator/local/supervisor.py", "_stop_pods"): "a task group",
    ("operator/kvasir_operator/local/group.py", "start"): "the group's keeper",
    ("operator/kvasir_operator/local/group.py", "stop"): "a task group",
    ("operator/kvasir_operator/local/group.py", "_again"): "a task group",
    ("operator/kvasir_operator/local/group.py", "_first_to_end"): "awaited there",
}
STARTERS = {"create_task", "ensure_future", "Thread", "run_coroutine_threadsafe", "start_new_thread", "Timer"}


def started(tree: ast.AST, within: str = "") -> Iterator[str]:
    """The functions, and classes that are threads, in which something is started that runs by itself."""
    for node in ast.iter_child_nodes(tree):
        name = within
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        if isinstance(node, ast.ClassDef) and any("Thread" in ast.unparse(base) for base in node.bases):
            yield node.name
        if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in STARTERS:
            yield within
        yield from started(node, name)


def found(folder: str) -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / folder).rglob("*.py")
        for name in started(ast.parse(path.read_text()))
    }


def test_what_runs_in_the_background_is_supervised() -> None:
    unsupervised = found("engine/kvasir_engine") | found("engine/kvasir") | found("operator/kvasir_operator")
    pods = {
        each for each in unsupervised if each[0].startswith("operator/kvasir_operator/pods/")
    }  # `pods` is a kubelet
    assert sorted(unsupervised - pods - AWAITED.keys()) == []
    assert sorted(AWAITED.keys() - unsupervised) == []


def test_a_bare_task_would_be_found() -> None:
    assert list(started(ast.parse("async def f():\n    t = asyncio.create_task(g())"))) == ["f"]
    assert list(started(ast.parse("class T(threading.Thread): ..."))) == ["T"]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["raises", "returns", "cancelled"])
async def test_the_end_of_a_task_is_heard_and_logged(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        if how == "raises":
            raise ValueError("as asked")
        if how == "cancelled":
            await asyncio.Event().wait()

    tasks, heard = Supervisor(), []
    own = tasks.start(work(), "own", heard.append)
    tasks.start(work(), "process")
    await asyncio.sleep(0)
    if how == "cancelled":
        own.cancel()
        next(task for task in asyncio.all_tasks() if task.get_name() == "process").cancel()
    async with asyncio.timeout(60):
        await tasks.over.wait()
    assert len(heard) == 1
    assert heard[0].startswith("own ")
    assert tasks.reason is not None
    assert tasks.reason.startswith("process ")
    assert sum("task ended" in line for line in caplog.messages) == 2


@pytest.mark.asyncio
async def test_a_task_that_was_stopped_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Supervisor()
    await tasks.stop(tasks.start(asyncio.Event().wait(), "stopped"))
    assert tasks.reason is None
    assert not caplog.messages


def test_the_end_of_a_thread_is_heard() -> None:
    def fails() -> None:
        raise ValueError("as asked")

    def leaves() -> None:
        raise ExpectedEnd

    heard: list[str] = []
    for work in (fails, leaves, lambda: None):
        start_thread(work, "t", heard.append).join(60)
    assert heard == ["t failed: ValueError: as asked", "t ended"]


def task_named(part: str) -> asyncio.Task[object]:
    return next(task for task in asyncio.all_tasks() if part in task.get_name())


@pytest.mark.dataplane
@pytest.mark.asyncio
async def test_each_task_of_a_connection_ends_it_and_it_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with running_workers() as it:
        for name in ("sender to decode", "watch of decode", "sender of session", "connection to decode"):
            task_named(name).cancel()
            await asyncio.sleep(0)
            async with asyncio.timeout(60):
                while len(it.client._pool.ready()) < 2:
                    await it.client._pool.change()
            await it.generate_undisturbed(PROMPT)
            assert any(name in line for line in caplog.messages), name
        await it.wait_idle()


@pytest.mark.dataplane
@pytest.mark.asyncio
@pytest.mark.parametrize("thread", ["engine", "transfer"])
async def test_nobody_waits_for_a_thread_that_is_gone(thread: str) -> None:
    def die(*_: object) -> None:
        raise SystemExit("killed by a test")

    async with running_workers() as it:
        async with router_of(it.decode) as socket:
            if thread == "engine":
                it.decode.thread.post(die)
                await socket.send(encode(Submit("a", PROMPT, Sampling(max_tokens=4))))
                with pytest.raises(ConnectionClosed):
                    async with asyncio.timeout(60):
                        await all_told(socket)
            else:
                it.decode.own.command(Killer())  # type: ignore[arg-type]
        worker: ToyWorker = it.decode
        async with asyncio.timeout(60):
            while not worker.ended:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert thread in worker.ended[0]
        assert worker.thread.unhealthy_reason() is not None
        if thread == "engine":
            client = InProcessClient(worker.thread)
            with pytest.raises(EngineError, match="thread"):
                async with asyncio.timeout(60):
                    await first(client)


class Killer:
    """A command that no transfer thread survives."""


async def all_told(socket: object) -> None:
    while True:
        await receive_frame(socket)  # type: ignore[arg-type]


async def first(client: InProcessClient) -> None:
    async for _ in client.generate(GenerateRequest("a", PROMPT, Sampling(max_tokens=1))):
        return
