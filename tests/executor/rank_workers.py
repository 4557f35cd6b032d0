"""Workers of several ranks as processes, driven through pipes by a test that is their router."""

import contextlib
import json
import multiprocessing as mp
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from kvasir_engine.config import EngineConfig
from kvasir_engine.entrypoints.build import build
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.executor.node_protocol import Nodes
from kvasir_engine.faults import VARIABLE
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pages import Owner
from kvasir_engine.logs import log_to_stderr
from kvasir_engine.protocol import Abort, Delta, Endpoint, Grammar, Leased, Reserve, Sampling, Step, Submit

VOCAB, LONGEST = 96, 256
END = VOCAB - 1
SECONDS = 60.0


def make_model(folder: Path) -> None:
    """Three layers with 8 heads and 4 KV heads, in float32, lively enough that all of the context matters."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow, and the workers' processes need it not

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=LONGEST,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _make_tokenizer(folder)


def _make_tokenizer(folder: Path) -> None:
    """A token for each printable character of ASCII, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [chr(code).replace(" ", "\u0120") for code in range(32, 127)]
    tokenizer = Tokenizer(models.BPE({name: token for token, name in enumerate([*names, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


class Greedy:
    """What one rank generates alone: the reference. `None` where a rounding error could change a token."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._runner = ModelRunner(folder, dtype="float32", device="cpu", page_size=LONGEST, pages=1)
        self._known: dict[tuple[int, ...], list[int] | None] = {}

    def __call__(self, prompt: list[int], count: int) -> list[int] | None:
        key = (count, *prompt)
        if key not in self._known:
            self._known[key] = self._generate(prompt, count)
        return self._known[key]

    def _generate(self, prompt: list[int], count: int) -> list[int] | None:
        tokens, computed = list(prompt), 0
        while len(tokens) < len(prompt) + count:
            fresh, positions = torch.tensor(tokens[computed:]), torch.arange(computed, len(tokens))
            batch = ForwardBatch(fresh, positions, [len(fresh)], [len(tokens)], torch.tensor([[0]]))
            best = self._runner.forward(batch)[0].topk(2)
            computed = len(tokens)
            if best.values[0] - best.values[1] < 1e-3:
                return None
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :]

    def prompt(self, rng: random.Random, length: int, count: int, start: list[int] | None = None) -> list[int]:
        """A prompt of this length, that begins with `start`, and has a clear answer of `count` tokens."""
        while True:
            begin = start or []
            prompt = begin + rng.choices(range(VOCAB), k=length - len(begin))
            if self(prompt, count) is not None:
                return prompt


def forkserver() -> Any:
    """Starts processes that have the engine imported (conftest.py)."""
    return mp.get_context("forkserver")


def engine_options(
    folder: Path, ranks: int, page_size: int, nodes: Nodes | None = None, **more: Any
) -> EngineConfig:
    """Those of the tests here."""
    return EngineConfig(
        f"file://{folder}",
        dtype="float32",
        device="cpu",
        tensor_parallel=ranks,
        page_size=page_size,
        kv_cache_memory=1 << 20,
        overlap="on" if ranks == 2 else "off",
        max_running=8,
        prefill_chunk=48,
        nnodes=nodes.count if nodes else 1,
        node_rank=nodes.rank if nodes else 0,
        dist_init_addr=f"{nodes.host}:{nodes.port}" if nodes else "",
        **more,
    )


def log_into(log: Path) -> None:
    """What this process and those that it starts say goes to a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    log_to_stderr()


def _work(
    pipe: Connection,
    options: EngineConfig,
    fault: str,
    log: Path,
    setup: Callable[[], None] | None,
) -> None:
    log_into(log)
    os.environ[VARIABLE] = fault
    if setup is not None:
        setup()
    thread, connector = build(options, True)
    assert connector is not None
    pipe.send(connector.endpoint)
    session = thread.attach(pipe.send)
    while True:
        match pipe.recv():
            case Submit() as frame:
                thread.post(lambda engine, frame=frame: engine.submit(session, frame))  # type: ignore[misc]
            case Reserve() as frame:
                thread.post(lambda engine, frame=frame: engine.reserve(session, frame))  # type: ignore[misc]
            case Abort(request):
                thread.post(lambda engine, request=request: engine.abort(session, request))  # type: ignore[misc]
            case "owned":
                thread.post(lambda engine: pipe.send(_owned(engine)))
            case "received":
                thread.post(lambda engine: pipe.send((engine.stats.requests.received, connector.stats)))
            case "links":
                thread.post(lambda engine: pipe.send(connector.links))
            case "forced":
                thread.post(lambda engine: pipe.send(engine.stats.requests.forced))
            case "read":
                thread.post(lambda engine: pipe.send((engine.readback.stats, connector.stats.read_bytes)))
            case "stop":
                thread.stop()
                connector.stop()
                thread.engine.runner.close()
                return


def _owned(engine: Any) -> dict[str, int]:
    engine.check()
    pool = engine.cache.pool
    owned = {owner.name: pool.count(owner) for owner in (Owner.HELD, Owner.LEASED, Owner.FENCED)}
    owned |= {"leases": len(engine.leases.open) + len(engine.leases.fenced)}
    owned |= {"pushes": len(engine.pushes.open)}
    owned |= {"lent": len(engine.loans.lent), "reads": len(engine.readback.reads)}
    return {what: count for what, count in owned.items() if count}


def children(pid: int | None) -> list[int]:
    """The processes that a process has started."""
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]


class Worker:
    """A worker's process. What it says comes through `next`."""

    def __init__(
        self,
        folder: Path,
        role: str,
        ranks: int,
        page_size: int,
        fault: str = "",
        nodes: Nodes | None = None,
        setup: Callable[[], None] | None = None,
    ) -> None:
        self.name = f"{role} of {ranks} with pages of {page_size}"
        options = engine_options(folder, ranks, page_size, nodes, role=role)
        self.log = folder / f"{secrets.token_hex(4)}.log"
        context = forkserver()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, options, fault, self.log, setup))
        self.process.start()
        theirs.close()
        self._endpoint: Endpoint | None = None
        self._others: list[Any] = []

    @property
    def endpoint(self) -> Endpoint:
        """Waits for the worker to be ready."""
        if self._endpoint is None:
            try:
                self._endpoint = self.pipe.recv()
            except EOFError:
                raise AssertionError(f"{self.name} has ended: {self.log.read_text()[-3000:]}") from None
        return self._endpoint

    def ask(self, what: str) -> Any:
        """The answer to a question that is no frame; frames that come before it are kept."""
        assert self.endpoint
        self.pipe.send(what)
        while isinstance(answer := self.pipe.recv(), list):
            self._others += answer
        return answer

    def frames(self) -> list[Any]:
        """What the engine has said since the last time."""
        frames, self._others = self._others, []
        with contextlib.suppress(EOFError, OSError):  # it has died
            while self.pipe.poll():
                frames += self.pipe.recv()
        return frames

    def rank_pids(self) -> list[int]:
        """Processes of the ranks other than 0."""
        return children(self.process.pid)

    def wait_quiet(self) -> None:
        """Until no page is held, leased or fenced."""
        deadline = time.monotonic() + SECONDS
        while owned := self.ask("owned"):
            assert time.monotonic() < deadline, f"{self.name} keeps {owned}"
            time.sleep(0.01)

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send("stop")
            self.process.join(SECONDS)
        assert self.process.exitcode == 0


class Workers:
    """Workers by shape; each shape is started once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[tuple[str, int, int], Worker] = {}

    def __call__(self, role: str, ranks: int, page_size: int) -> Worker:
        key = role, ranks, page_size
        if key not in self._started:
            self._started[key] = Worker(self._folder, *key)
        return self._started[key]

    def close(self) -> None:
        for worker in self._started.values():
            worker.close()


class Faulty:
    """Starts workers that a fault ends, and sees to it that they have ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Worker] = []

    def __call__(self, role: str, ranks: int, fault: str) -> Worker:
        worker = Worker(self._folder, role, ranks, 16, fault)
        self._started.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._started:
            worker.process.kill()
            worker.process.join()


def ended(worker: Worker, line: str) -> None:
    """The worker ends with status 1, and says why in its last line."""
    worker.process.join(SECONDS)
    assert worker.process.exitcode == 1
    errors = [each for each in worker.log.read_text().splitlines() if each.startswith("kvasir: error:")]
    assert errors == [f"kvasir: error: {line}; the worker ends with it"]


@dataclass
class Request:
    """One request and what became of it. `cached`: tokens that the decode worker had of its prompt."""

    id: str
    prompt: list[int]
    count: int
    tokens: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    finished: bool = False
    cached: int = 0
    grammar: Grammar | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.count, grammar=self.grammar, stop_token_ids=[END] if self.grammar else [])

    @property
    def output(self) -> list[int]:
        return [self.tokens[index] for index in sorted(self.tokens)]

    @property
    def over(self) -> bool:
        return self.finished or bool(self.failures)


class Router:
    """Takes requests to a decode worker and to `prefill`, or another that is named. Aborts on both what fails."""

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self.prefill, self.decode = prefill, decode
        self.requests: dict[str, Request] = {}
        self._writers: dict[str, Worker] = {}

    def ask(self, request: Request, prefill: Worker | None = None, lend_from: int | None = None) -> None:
        """Begin. With `lend_from` prefill, which has so many of the tokens, reads what decode has beyond them."""
        self.requests[request.id] = request
        self._writers[request.id] = writer = prefill or self.prefill
        assert self.decode.endpoint
        sampling = request.sampling
        self.decode.pipe.send(Reserve(request.id, request.prompt, sampling, writer.endpoint, lend_from=lend_from))

    def ask_decode(self, request: Request) -> None:
        """Begin a request that the decode worker does alone."""
        self.requests[request.id] = request
        self._writers[request.id] = self.prefill
        sampling, threshold = request.sampling, len(request.prompt) + 1
        assert self.decode.endpoint
        if self.prefill is self.decode:
            self.decode.pipe.send(Submit(request.id, request.prompt, sampling))
            return
        self.decode.pipe.send(
            Reserve(request.id, request.prompt, sampling, self.prefill.endpoint, threshold=threshold)
        )

    def abort(self, request: Request) -> None:
        """The client left."""
        request.failures.append("aborted")
        for worker in (self._writers[request.id], self.decode):
            _send(worker, Abort(request.id))

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Pass frames on until `until`, or until all requests are over."""
        deadline = time.monotonic() + SECONDS
        until = until or (lambda: all(each.over for each in self.requests.values()))
        while not until():
            assert time.monotonic() < deadline, f"waited in vain: {self.requests}"
            living = [each for each in {*self._writers.values(), self.decode} if each.process.is_alive()]
            wait([each.pipe for each in living], 0.1)
            for worker in living:
                for frame in worker.frames():
                    self._take(worker, frame)

    def _take(self, worker: Worker, frame: Any) -> None:
        if isinstance(frame, Leased):
            request = self.requests.get(frame.id)
            if request is not None and frame.lease is not None and not request.over:
                sampling, to = request.sampling, self.decode.endpoint
                request.cached = frame.lease.first
                submit = Submit(request.id, request.prompt, sampling, lease=frame.lease, to=to)
                _send(self._writers[request.id], submit)
        elif isinstance(frame, Step):
            for delta in frame.deltas:
                if delta.id in self.requests:  # and not an earlier router's
                    self._note(worker, self.requests[delta.id], delta)

    def _note(self, worker: Worker, request: Request, delta: Delta) -> None:
        for index, token in enumerate(delta.tokens, delta.index):
            assert request.tokens.setdefault(index, token) == token, "the two workers do not agree"
        if delta.failure is not None and not request.over:
            request.failures.append(delta.failure.code)
            self.abort(request)
        if worker is self.decode and delta.finish is not None:
            request.finished = True


def _send(worker: Worker, frame: Any) -> None:
    with contextlib.suppress(OSError):  # it has died
        worker.pipe.send(frame)
