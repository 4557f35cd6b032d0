"""A tiny real tokenizer, a scripted engine, and the front end on a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvasir_engine.api.app import create_app
from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.folder_store import FolderStore
from kvasir_engine.api.batch.objects.bucket import Bucket
from kvasir_engine.api.batch.objects.store import ObjectStore
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.batch.service import running_batches
from kvasir_engine.api.batch.stores import BatchStore
from kvasir_engine.api.http.connections import ConnectionGate
from kvasir_engine.api.http.limits import HttpLimits
from kvasir_engine.api.http.protocols import GuardedHttp
from kvasir_engine.api.http.server import listen
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.engine_client import EngineError, GenerateRequest, Output
from kvasir_engine.protocol import PromptLogprobs, TokenLogprobs
from kvasir_engine.supervisor import Supervisor

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS = 257


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (0-255), then <|im_start|> (256) and <|im_end|> (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def tiny_model() -> ServedModel:
    return ServedModel("tiny", Tokenizer(tiny_tokenizer()), vocab_size=258, eos=(EOS,), created=1700000000)


Script = Callable[[GenerateRequest], AsyncGenerator[Output, None]]


class ScriptedEngine:
    """An EngineClient that answers by `script`, and tells of what it was asked and of generators that ended."""

    def __init__(self, script: Script, max_length: int = 4096) -> None:
        self.script = script
        self.max_length = max_length
        self.reason: str | None = None
        self.requests: list[GenerateRequest] = []
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def wait_ready(self) -> str | None:
        return self.unready_reason()

    def unready_reason(self) -> str | None:
        return self.reason

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        try:
            async with contextlib.aclosing(self.script(request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self.ended.put_nowait(request.id)


def prompt_scores(prompt: Sequence[int], most: int) -> list[PromptLogprobs]:
    """Of each token but the first, by its number; the likeliest are A, B and so on."""
    top = [(token, -0.5 - place) for place, token in enumerate(range(65, 65 + most))]
    return [PromptLogprobs(-token / 100, token % 7 + 1, top) for token in prompt[1:]]


def saying(tokens: Sequence[int], *, cached: int = 0, each: int = 1) -> Script:
    """A script that gives `tokens`, `each` at a time, then the end token; heeding max_tokens and stop_token_ids.

    With `ignore_eos` it has no more room behind them.
    """

    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        sampling = request.sampling
        given: list[int] = []
        finish = None
        for token in [*tokens, EOS]:
            given.append(token)
            finish = "stop" if token in sampling.stop_token_ids else None
            if finish is None and len(given) == sampling.max_tokens:
                finish = "length"
            if finish:
                break
        for start in range(0, len(given), each):
            some = given[start : start + each]
            last = start + each >= len(given)
            logprobs = None
            if sampling.logprobs is not None:
                top = [(token, -0.5) for token in range(65, 65 + sampling.logprobs)]
                logprobs = [TokenLogprobs(-0.25, top) for _ in some]
            asked = None if start else sampling.prompt_logprobs
            first = sampling.unscored(len(request.tokens))
            scores = None if asked is None else prompt_scores(request.tokens, asked)[first - 1 :]
            yield Output(some, logprobs, (finish or "length") if last else None, cached, scores)

    return script


def failing(after: Sequence[int], error: EngineError) -> Script:
    async def script(_: GenerateRequest) -> AsyncGenerator[Output, None]:
        for token in after:
            yield Output([token], cached_tokens=0)
        raise error

    return script


def endless(token: int = 65) -> Script:
    """A script that goes on until it is closed, or the engine is asked to stop."""

    async def script(_: GenerateRequest) -> AsyncGenerator[Output, None]:
        while True:
            yield Output([token], cached_tokens=0)
            await asyncio.sleep(0.001)

    return script


@dataclass
class Api:
    url: str
    engine: ScriptedEngine
    registry: CollectorRegistry
    lifecycle: Lifecycle

    def client(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def store_at(place: Path | str, limits: BatchLimits | None = None) -> BatchStore:
    """A folder, or an object store that writes at once."""
    if isinstance(place, Path):
        return FolderStore(place, limits)
    return ObjectStore(Bucket(place), limits, linger=0.0)


@contextlib.asynccontextmanager
async def running(
    engine: ScriptedEngine,
    model: ServedModel,
    keys: ApiKeys | None = None,
    batch_dir: Path | str | None = None,
    limits: BatchLimits | None = None,
) -> AsyncIterator[Api]:
    registry, lifecycle = CollectorRegistry(), Lifecycle()
    batches = BatchRunner(store_at(batch_dir, limits), lifecycle, limits, wait=0.01) if batch_dir else None
    tasks = Supervisor()
    with ThreadPoolExecutor(2) as executor:
        app = create_app(
            engine,
            model,
            registry=registry,
            lifecycle=lifecycle,
            executor=executor,
            keys=keys,
            batches=batches,
        )
        sock = listen("127.0.0.1", 0)
        gate = ConnectionGate(HttpLimits())

        def guarded(config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> GuardedHttp:
            return GuardedHttp(gate, config, server_state, app_state)

        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1, http=guarded)  # type: ignore[arg-type]
        )
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            async with running_batches(batches, app, engine, tasks):
                yield Api(f"http://127.0.0.1:{sock.getsockname()[1]}", engine, registry, lifecycle)
        finally:
            server.should_exit = True
            await serving
