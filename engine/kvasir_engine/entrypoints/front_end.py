"""The API of one process, for every command that serves it: `router`, `serve`, and each API process of a server.

Made from the command's options in three steps, so that what is wrong is said before anything slow: files, model,
application.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from kvasir_engine.api.app import create_app
from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.batch.service import batches_of, running_batches
from kvasir_engine.api.grammar_check import GrammarCheck
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.special_token_policy import ParseSpecial
from kvasir_engine.api.tokenizer import ServedModel, load_served_model
from kvasir_engine.api.tools.flags import Parsers
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.engine_client import EngineClient
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.supervisor import Supervisor

TOKENIZER_THREADS = 2
"""Of a process that shares its machine with the engine."""


class ApiOptions(Protocol):
    """What the command line of each command says of its API."""

    @property
    def name(self) -> str:
        """The model's name in the API."""

    @property
    def parse_special_tokens(self) -> ParseSpecial: ...
    @property
    def parsers(self) -> Parsers: ...
    @property
    def json_whitespace(self) -> str | None: ...
    @property
    def api_keys_file(self) -> str: ...
    @property
    def batch_dir(self) -> str: ...


@dataclass(frozen=True)
class ApiFiles:
    """The keys and the folder of batches that an API reads. `lifecycle` counts its requests and batches'."""

    lifecycle: Lifecycle
    keys: ApiKeys | None
    batches: BatchRunner | None


def api_files(options: ApiOptions, lifecycle: Lifecycle) -> ApiFiles:
    """The files that the options name. Raises UserError."""
    batches = batches_of(options.batch_dir, lifecycle)
    return ApiFiles(lifecycle, ApiKeys(Path(options.api_keys_file)) if options.api_keys_file else None, batches)


async def served_model(options: ApiOptions, uri: str, revision: str, weights: bool = False) -> ServedModel:
    """The tokenizer and templates of the model at `uri`, which has been fetched with its weights if `weights`.

    Raises ModelError, TokenizerError.
    """
    folder = await asyncio.to_thread(resolve, uri, revision or None, weights=weights)
    load = partial(load_served_model, folder, options.name, options.parse_special_tokens, options.parsers)
    return replace(await asyncio.to_thread(load), json_whitespace=options.json_whitespace)


@dataclass(frozen=True)
class FrontEnd:
    """A process's API. `running_batches` is to be entered while `app` is served."""

    app: FastAPI
    running_batches: Callable[[], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def front_end(
    client: EngineClient,
    model: ServedModel,
    files: ApiFiles,
    tasks: Supervisor,
    registry: CollectorRegistry,
    *,
    threads: int = TOKENIZER_THREADS,
    over: Callable[[], str | None] = lambda: None,
    all_metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> AsyncIterator[FrontEnd]:
    """The application over `client`, with `threads` that tokenize and processes that try grammars.

    Both end with this context. Long texts leave one thread free. Batches, if there are any, run in `tasks`.
    `registry`, `over` and `all_metrics` are as `create_app` has them.
    """
    with (
        ThreadPoolExecutor(threads, "kvasir-tokenizer") as executor,
        closing(GrammarCheck(partial(vocabulary_of, model))) as grammars,
    ):
        app = create_app(
            client,
            model,
            registry=registry,
            lifecycle=files.lifecycle,
            executor=executor,
            long_ones=threads - 1,
            keys=files.keys,
            over=over,
            batches=files.batches,
            grammars=grammars,
            all_metrics=all_metrics,
        )
        yield FrontEnd(app, partial(running_batches, files.batches, app, client, tasks))
