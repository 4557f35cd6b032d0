"""`kvasir serve --api-processes`: one engine and several API processes, over real sockets, and how they end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models
from api_support import tiny_tokenizer
from prometheus_client.parser import text_string_to_metric_families

from kvasir_engine.api.joint_metrics import MetricsUnknown, added, gathered
from kvasir_engine.entrypoints.serve import process_count
from kvasir_engine.errors import UserError

COMMAND = [sys.executable, "-c", "from kvasir_engine.entrypoints.cli import main; main()", "serve"]
LENGTH = 60_000  # tokens: a stream that no machine ends while a test looks
SECONDS = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 258, "eos_token_id": 257, "max_position_embeddings": LENGTH, "num_hidden_layers": 1}
    tiny_models.llama(**sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Server:
    """`kvasir serve`, and what it and its processes have said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    @property
    def said(self) -> str:
        return "".join(self.lines)

    async def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        async with asyncio.timeout(SECONDS):
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(self.said)

    async def ended(self) -> int:
        """The exit status, once all processes have ended: each holds the pipe open."""
        assert self.process.stderr is not None
        async with asyncio.timeout(SECONDS):
            self.lines.append((await self.process.stderr.read()).decode())
            return await self.process.wait()

    def child(self, name: str) -> int:
        """The pid of one of its processes, by what its command line has."""
        folder = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in folder.read_text().split():
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        raise AssertionError(name)


@contextlib.asynccontextmanager
async def serve(model: str, *args: str) -> AsyncIterator[Server]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, model, "--host", "127.0.0.1", "--port", "0", *args, stderr=asyncio.subprocess.PIPE
    )
    server = Server(process)
    try:
        yield server
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def two(folder: Path) -> AsyncIterator[Server]:
    """A server with two API processes, which serves."""
    options = ["--served-model-name", "m", "--kv-cache-memory", "64Mi", "--dtype", "float32"]
    async with serve(f"file://{folder}", *options, "--api-processes", "2") as server:
        found = await server.until(r"serving model='m' address=127\.0\.0\.1:(\d+) api_processes=2")
        server.url = f"http://127.0.0.1:{found[1]}"
        yield server


def asked(tokens: int, stream: bool = True) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": "hello",
        "max_tokens": tokens,
        "stream": stream,
        "temperature": 0,
        "ignore_eos": True,
    }


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Each request by a connection of its own, so that the kernel divides them."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=SECONDS, trust_env=False) as found:
        yield found


@contextlib.asynccontextmanager
async def streaming(http: httpx.AsyncClient, server: Server, tokens: int) -> AsyncIterator[AsyncIterator[str]]:
    async with http.stream("POST", f"{server.url}/v1/completions", json=asked(tokens)) as answer:
        assert answer.status_code == 200
        yield answer.aiter_lines()


async def event(lines: AsyncIterator[str]) -> str:
    async for line in lines:
        if line:
            return line
    raise AssertionError("the stream ended")


async def metric(http: httpx.AsyncClient, server: Server, name: str) -> float:
    answer = await http.get(f"{server.url}/metrics")
    assert answer.status_code == 200, answer.text
    families = text_string_to_metric_families(answer.text)
    return sum(each.value for family in families for each in family.samples if each.name == name)


async def becomes(http: httpx.AsyncClient, server: Server, name: str, value: float) -> None:
    async with asyncio.timeout(SECONDS):
        while await metric(http, server, name) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.dataplane
async def test_streams_aborts_and_a_drain_over_two_api_processes(folder: Path) -> None:
    async with two(folder) as server, client() as http:
        answers = await asyncio.gather(
            *(http.post(f"{server.url}/v1/completions", json=asked(20, stream=False)) for _ in range(16))
        )
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1, "one engine answers all"
        async with streaming(http, server, 20) as lines:
            events = [line.removeprefix("data: ") async for line in lines if line]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1]) in texts
        refused = await http.post(f"{server.url}/v1/completions", json=asked(LENGTH + 1))
        assert refused.status_code == 400
        # Whoever is asked shows the sum: of 16, the stream and the refused one, by two processes.
        assert await metric(http, server, "kvasir_requests_total") == 18
        assert await metric(http, server, "kvasir_generation_tokens_total") == 17 * 20

        async with streaming(http, server, LENGTH - 10) as lines:
            await event(lines)
            assert await metric(http, server, "kvasir_requests_running") == 1
        await becomes(http, server, "kvasir_requests_running", 0)  # the client left, and the engine knows

        async with streaming(http, server, LENGTH - 10) as lines:
            await event(lines)
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(SECONDS):
                while "draining" not in (await http.get(f"{server.url}/ready")).text:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            for _ in range(20):
                await event(lines)  # what runs goes on
        assert await server.ended() == 0, server.said
        assert "error" not in server.said.lower(), server.said


@pytest.mark.dataplane
async def test_when_one_process_ends_all_end_with_one_line(folder: Path) -> None:
    async with two(folder) as server, client() as http:
        cut = (httpx.RemoteProtocolError, httpx.ReadError)
        with contextlib.suppress(*cut):
            async with streaming(http, server, LENGTH - 10) as lines:
                await event(lines)
                os.kill(server.child("api_process"), signal.SIGKILL)
                async for _ in lines:
                    pass
        assert await server.ended() == 1, server.said
        assert [line for line in server.said.splitlines() if line.startswith("kvasir: error")] == [
            "kvasir: error: API process 0 of 2 was killed by signal 9; the server ends with it"
        ]


@pytest.mark.dataplane
async def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path: Path) -> None:
    async with serve(f"file://{tmp_path}/nothing", "--api-processes", "1") as server:
        assert await server.ended() == 2
    assert server.said.startswith("kvasir: error: ")
    assert len(server.said.splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "gpu", "batches", "cores", "count"),
    [
        ("auto", False, "", 64, 0),
        ("auto", True, "", 2, 1),
        ("auto", True, "", 16, 4),
        ("auto", True, "", 192, 4),
        ("auto", True, "/b", 192, 1),
        ("0", True, "", 16, 0),
        ("3", False, "", 1, 3),
        ("1", False, "/b", 1, 1),
    ],
)
def test_how_many_processes_there_are(said: str, gpu: bool, batches: str, cores: int, count: int) -> None:
    assert process_count(said, gpu, batches, cores) == count


@pytest.mark.parametrize("said", ["", "-1", "65", "two", "1.5", "²"])
def test_a_count_that_is_none_is_refused_by_name(said: str) -> None:
    with pytest.raises(UserError, match="api-processes is auto or a number from 0 to 64, not"):
        process_count(said, False, "", 1)


def test_a_folder_of_batches_is_one_processs_own() -> None:
    assert process_count("2", True, "s3://bucket", 8) == 2
    with pytest.raises(UserError, match="api-processes 2 and batch-dir"):
        process_count("2", False, "/b", 8)


def test_expositions_are_added_by_name_and_labels() -> None:
    one = """# HELP a_total Some.
# TYPE a_total counter
a_total{code="200"} 2.0
a_created{code="200"} 50.0
# HELP h Times.
# TYPE h histogram
h_bucket{le="1.0"} 1.0
h_bucket{le="+Inf"} 3.0
h_count 3.0
h_sum 7.5
"""
    other = one.replace('"200"', '"404"') + "# HELP own Alone.\n# TYPE own gauge\nown 5.0\n"
    earlier = one.replace(" 50.0", " 40.0")
    families = {
        family.name: family for family in text_string_to_metric_families(added(one, other, earlier).decode())
    }
    values = {
        (each.name, *each.labels.values()): each.value for family in families.values() for each in family.samples
    }
    assert values == {
        ("a_total", "200"): 4.0,
        ("a_total", "404"): 2.0,
        ("a_created", "200"): 40.0,
        ("a_created", "404"): 50.0,
        ("h_bucket", "1.0"): 3.0,
        ("h_bucket", "+Inf"): 9.0,
        ("h_count",): 9.0,
        ("h_sum",): 22.5,
        ("own",): 5.0,
    }
    assert (families["a"].type, families["h"].type, families["own"].type) == ("counter", "histogram", "gauge")


async def test_a_process_that_shows_no_metrics_is_named(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry

    with pytest.raises(MetricsUnknown, match="no metrics of engine: FileNotFoundError"):
        await gathered(CollectorRegistry(), [tmp_path / "engine.metrics"])
