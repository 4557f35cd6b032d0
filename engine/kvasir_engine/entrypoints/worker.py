"""`kvasir worker` and `kvasir serve`: from the command line to a served port.

Imports of torch and NIXL wait until a command runs, so that `kvasir --help` is quick.
"""

import asyncio
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvasir_engine.api.batch.folder import BATCH_HELP
from kvasir_engine.api.json_whitespace import WHITESPACE_HELP, WHITESPACE_VARIABLE
from kvasir_engine.api.json_whitespace import json_whitespace as whitespace_of
from kvasir_engine.api.special_token_policy import PARSE_HELP, ParseSpecial, parse_special
from kvasir_engine.api.tools.flags import (
    REASONING_HELP,
    REASONING_VARIABLE,
    TOOL_HELP,
    TOOL_VARIABLE,
    Parsers,
    parsers,
)
from kvasir_engine.config import FIELDS, EngineConfig, config_of
from kvasir_engine.entrypoints.options import command
from kvasir_engine.protocol import CAPABILITIES, GRAMMAR, LATEST, VERSION, Hello
from kvasir_engine.thread_wait_policy import let_threads_sleep
from kvasir_engine.tls import check_role, credentials_of

log = logging.getLogger("worker")


def _run_worker(**said: Any) -> None:
    config = config_of(said)
    let_threads_sleep(config.device)
    if config.node_rank:
        from kvasir_engine.entrypoints.follower_node import follow

        follow(config)
        return
    asyncio.run(_worker(config))


worker = command(
    "worker",
    _run_worker,
    "One worker: computes prompts (prefill), generates (decode), or both.",
    {},
    required=("role",),
)


async def _worker(config: EngineConfig) -> None:
    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import Secured, check_port, end_at_sigterm, listen, serve
    from kvasir_engine.entrypoints.build import build
    from kvasir_engine.entrypoints.worker_server import WorkerServer
    from kvasir_engine.keepalive import notice_silence
    from kvasir_engine.supervisor import end_process

    end_at_sigterm()
    check_port(config.host, config.port)  # before minutes of loading; the port opens after it
    credentials = credentials_of(config.tls_dir)
    if credentials is not None:
        check_role(credentials, config.role)
        listen(config.host, config.worker_port).close()
    loop, leave = asyncio.get_running_loop(), asyncio.Event()

    def another_leaves() -> None:
        loop.call_soon_threadsafe(leave.set)

    thread, handoff = await asyncio.to_thread(build, config, True, another_leaves, end_process, credentials)
    assert handoff is not None
    hello = Hello(
        VERSION,
        thread.engine.epoch,
        config.role,
        config.served_model_name or config.model,
        thread.engine.max_length,
        config.max_running,
        handoff.endpoint,
        latest=LATEST,
        capabilities=CAPABILITIES if thread.engine.grammars.service is None else (*CAPABILITIES, GRAMMAR),
        place=thread.engine.policy.place,
        encryption=config.encryption,
    )
    server = WorkerServer(thread, hello, apart=credentials is not None)
    leaving = GracefulShutdown(server, config.drain_seconds)
    server.show_status(leaving)
    try:
        sock = listen(config.host, config.port)
        notice_silence(sock)  # requests of a router whose machine is lost are aborted
        secured = None
        if credentials is not None:
            routers = listen(config.host, config.worker_port)
            notice_silence(routers)
            secured = Secured(server.router_app, routers, credentials, ("router",))
            log.info("serving routers identity=%s port=%d", credentials.identity, routers.getsockname()[1])
        log.info("serving role=%s address=%s:%d", config.role, *sock.getsockname()[:2])
        await serve(server.app, sock, leaving, leave, secured=secured)
    finally:
        thread.stop()
        handoff.stop()
        thread.engine.runner.close()


def _run_serve(
    api_keys_file: str,
    batch_dir: str,
    parse_special_tokens: str,
    tool_call_parser: str,
    reasoning_parser: str,
    json_whitespace: str,
    **said: Any,
) -> None:
    config = config_of(said)
    let_threads_sleep(config.device)
    readers, whitespace = parsers(tool_call_parser, reasoning_parser), whitespace_of(json_whitespace)
    asyncio.run(_serve(config, parse_special(parse_special_tokens), readers, whitespace, api_keys_file, batch_dir))


serve = command(
    "serve",
    _run_serve,
    "The OpenAI API over one engine, in one process.",
    {
        "model": (Annotated[str, typer.Argument(help=FIELDS["model"].setting.help)], inspect.Parameter.empty),
        "api_keys_file": (Annotated[str, typer.Option(envvar="KVASIR_API_KEYS_FILE")], ""),
        "batch_dir": (Annotated[str, typer.Option(help=BATCH_HELP, envvar="KVASIR_BATCH_DIR")], ""),
        "parse_special_tokens": (
            Annotated[str, typer.Option(help=PARSE_HELP, envvar="KVASIR_PARSE_SPECIAL_TOKENS")],
            "prompts",
        ),
        "tool_call_parser": (Annotated[str, typer.Option(help=TOOL_HELP, envvar=TOOL_VARIABLE)], "auto"),
        "reasoning_parser": (
            Annotated[str, typer.Option(help=REASONING_HELP, envvar=REASONING_VARIABLE)],
            "auto",
        ),
        "json_whitespace": (
            Annotated[str, typer.Option(help=WHITESPACE_HELP, envvar=WHITESPACE_VARIABLE)],
            "any",
        ),
    },
    worker=False,
    defaults={"drain_seconds": 30.0},
)


async def _serve(
    config: EngineConfig,
    parse: ParseSpecial,
    readers: Parsers,
    whitespace: str | None,
    keys_file: str,
    batch_dir: str,
) -> None:
    from prometheus_client import CollectorRegistry

    from kvasir_engine.api.app import create_app
    from kvasir_engine.api.auth import ApiKeys
    from kvasir_engine.api.batch.service import batches_of, working
    from kvasir_engine.api.grammar_check import GrammarCheck
    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import check_port, listen
    from kvasir_engine.api.http.server import serve as serve_app
    from kvasir_engine.api.lifecycle import Lifecycle
    from kvasir_engine.api.tokenizer import load_served_model
    from kvasir_engine.api.vocabulary import vocabulary_of
    from kvasir_engine.core.inprocess_client import InProcessClient
    from kvasir_engine.core.metrics import EngineCollector
    from kvasir_engine.entrypoints.build import build
    from kvasir_engine.model.loading.resolver import resolve
    from kvasir_engine.supervisor import Supervisor, end_process

    check_port(config.host, config.port)
    lifecycle, tasks = Lifecycle(), Supervisor(end_process)
    batches = batches_of(batch_dir, lifecycle)
    name = config.served_model_name or config.model
    thread, _ = await asyncio.to_thread(build, config, False, ended=end_process)
    folder = resolve(config.model, config.revision or None)
    model = await asyncio.to_thread(load_served_model, folder, name, parse, readers)
    model = replace(model, json_whitespace=whitespace)
    registry = CollectorRegistry()
    registry.register(EngineCollector(thread.engine))
    keys = ApiKeys(Path(keys_file)) if keys_file else None
    try:
        with (
            ThreadPoolExecutor(2, "kvasir-tokenizer") as executor,
            closing(GrammarCheck(partial(vocabulary_of, model))) as grammars,
        ):
            client = InProcessClient(thread)
            app = create_app(
                client,
                model,
                registry=registry,
                lifecycle=lifecycle,
                executor=executor,
                keys=keys,
                batches=batches,
                grammars=grammars,
            )
            leaving = GracefulShutdown(lifecycle, config.drain_seconds)
            sock = listen(config.host, config.port)
            log.info("serving model=%r address=%s:%d", name, *sock.getsockname()[:2])
            async with working(batches, app, client, tasks):
                await serve_app(app, sock, leaving)
    finally:
        thread.stop()
        thread.engine.runner.close()
