"""Workers of one InferenceService as processes with certificates, and a router of it in the test's own."""

import asyncio
import contextlib
import multiprocessing as mp
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from certificates import Authority
from prometheus_client import CollectorRegistry

from kvasir_engine.engine_client import GenerateRequest
from kvasir_engine.protocol import Sampling
from kvasir_engine.router.client import PooledClient
from kvasir_engine.router.pool import WorkerPool
from kvasir_engine.router.worker_trust import WorkerTrust
from kvasir_engine.tls import Credentials

SECONDS = 180.0
VOCAB = 96


def make_model(folder: Path) -> Path:
    """Two layers that all of the context matters to, in bfloat16, with heads of 32 dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _run(log: str, arguments: list[str]) -> None:
    """The command line, in a process that has imported most of it."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["kvasir", *arguments]
    from kvasir_engine.entrypoints.cli import main

    main()


def forkserver() -> Any:
    return mp.get_context("forkserver")


class Process:
    """A command of kvasir's; what it says is in `log`."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        log.touch()
        self.process = forkserver().Process(target=_run, args=(str(log), list(arguments)))
        self.process.start()

    def until(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """The first line with `pattern`, in bounded time."""
        end = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def ended(self) -> int | None:
        """Its exit status, once it has ended."""
        self.process.join(SECONDS)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(SECONDS)


class WorkerProcess(Process):
    """`kvasir worker`; `tls` is its folder, or None."""

    def __init__(self, log: Path, model: Path, role: str, tls: Path | None, *more: str) -> None:
        arguments = ["worker", "--role", role, "--model", f"file://{model}", "--served-model-name", "small"]
        arguments += ["--host", "127.0.0.1", "--port", "0", "--kv-cache-memory", "4Mi", "--drain-seconds", "1"]
        arguments += ["--check-pages", "--dtype", "float32", *more]
        if tls is not None:
            arguments += ["--tls-dir", str(tls), "--worker-port", "0"]
        super().__init__(log, *arguments)
        self.secure = tls is not None

    @property
    def http(self) -> str:
        return "127.0.0.1:" + self.until(r"serving role=\w+ address=[\d.]+:(\d+)")[1]

    @property
    def url(self) -> str:
        """As a router is told it."""
        if not self.secure:
            return f"ws://{self.http}"
        return "wss://127.0.0.1:" + self.until(r"serving routers identity=.* port=(\d+)")[1]


@dataclass
class Service:
    """Folders of certificates by role, and a place for what processes say."""

    folder: Path
    model: Path
    ca: Authority = field(default_factory=Authority)
    started: list[Process] = field(default_factory=list)

    def tls(self, role: str) -> Path:
        path = self.folder / f"tls-{role}"
        return path if path.exists() else self.ca.folder(path, role)

    def worker(self, role: str, *more: str, tls: Path | None = None, plain: bool = False) -> WorkerProcess:
        log = self.folder / f"{role}-{len(self.started)}.log"
        worker = WorkerProcess(log, self.model, role, None if plain else tls or self.tls(role), *more)
        self.started.append(worker)
        return worker

    def close(self) -> None:
        for each in self.started:
            each.kill()

    @contextlib.asynccontextmanager
    async def router(
        self, *workers: WorkerProcess | str, trust: WorkerTrust | None = None, ready: int | None = None
    ) -> AsyncIterator["Router"]:
        """A router of these; as it is once `ready` of them are (all)."""
        trust = WorkerTrust(Credentials(self.tls("router"))) if trust is None else trust
        pool = WorkerPool(trust=trust)
        client = PooledClient(pool, registry=CollectorRegistry(), remote_threshold=0)
        urls = [each if isinstance(each, str) else each.url for each in workers]
        pool.set_workers({url: url for url in urls})
        try:
            async with asyncio.timeout(SECONDS):
                while len(pool.ready()) < (len(urls) if ready is None else ready):
                    await pool.change()
            yield Router(pool, client)
        finally:
            await client.close()
            await pool.close()


@dataclass
class Router:
    pool: WorkerPool
    client: PooledClient

    async def generate(self, prompt: list[int], count: int, salt: str = "") -> list[int]:
        got: list[int] = []
        async with asyncio.timeout(SECONDS):
            async for output in self.client.generate(
                GenerateRequest("r", prompt, Sampling(max_tokens=count), salt)
            ):
                got += output.tokens
        return got

    async def state(self, url: str, state: str) -> str:
        """Wait until the worker at `url` is in this state; the reason for it."""
        worker = self.pool._workers[url]
        async with asyncio.timeout(SECONDS):
            while worker.state != state:
                await self.pool.change()
        return worker.reason
