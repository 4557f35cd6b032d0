"""`kvasir serve`: the OpenAI API over one engine, in one process or in several.

Imports of torch wait until the command runs, so that `kvasir --help` is quick.
"""

import asyncio
import inspect
import logging
import os
from typing import Annotated, Any

import typer

from kvasir_engine.api.batch.folder import BATCH_HELP
from kvasir_engine.api.json_whitespace import WHITESPACE_HELP, WHITESPACE_VARIABLE
from kvasir_engine.api.json_whitespace import json_whitespace as whitespace_of
from kvasir_engine.api.special_token_policy import PARSE_HELP, parse_special
from kvasir_engine.api.tools.flags import (
    REASONING_HELP,
    REASONING_VARIABLE,
    TOOL_HELP,
    TOOL_VARIABLE,
    parsers,
)
from kvasir_engine.config import FIELDS, config_of
from kvasir_engine.entrypoints.options import command
from kvasir_engine.entrypoints.process_channel import ServeOptions
from kvasir_engine.errors import UserError
from kvasir_engine.interruptible import run_interruptible
from kvasir_engine.thread_wait_policy import let_threads_sleep

log = logging.getLogger("worker")

MOST_PROCESSES = 64
CORES_A_PROCESS = 4
"""The default number of API processes on a GPU host."""
MOST_AUTO = 4
PROCESSES_HELP = (
    "processes of the API beside one of the engine, which share the port; 0: API and engine are one process; "
    "auto: 0 on CPUs, and on a GPU host one for each 4 cores, at most 4"
)


def process_count(said: str, gpu: bool, batch_dir: str, cores: int) -> int:
    """The number of API processes for `--api-processes`; 0 for none. Raises UserError.

    A folder of batches can be used by one process only, an object store by any number.
    """
    alone = bool(batch_dir) and "://" not in batch_dir
    if said == "auto":
        most = 1 if alone else MOST_AUTO
        return max(1, min(most, cores // CORES_A_PROCESS)) if gpu else 0
    if not said.isascii() or not said.isdigit() or int(said) > MOST_PROCESSES:
        raise UserError(f"api-processes is auto or a number from 0 to {MOST_PROCESSES}, not {said!r}")
    if alone and int(said) > 1:
        raise UserError(f"api-processes {said} and batch-dir: a folder is one process's own; say 1, or 0")
    return int(said)


def _run_serve(
    api_keys_file: str,
    batch_dir: str,
    parse_special_tokens: str,
    tool_call_parser: str,
    reasoning_parser: str,
    json_whitespace: str,
    api_processes: str,
    **said: Any,
) -> None:
    config = config_of(said)
    gpu = let_threads_sleep(config.device)
    count = process_count(api_processes, gpu, batch_dir, len(os.sched_getaffinity(0)))
    readers = parsers(tool_call_parser, reasoning_parser)
    options = ServeOptions(
        config,
        parse_special(parse_special_tokens),
        readers,
        api_keys_file,
        batch_dir,
        whitespace_of(json_whitespace),
    )
    if count:
        from kvasir_engine.entrypoints.serve_processes import serve_processes

        run_interruptible(serve_processes(options, count))
    else:
        run_interruptible(_serve(options))


serve = command(
    "serve",
    _run_serve,
    "The OpenAI API over one engine.",
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
        "api_processes": (
            Annotated[str, typer.Option(help=PROCESSES_HELP, envvar="KVASIR_API_PROCESSES")],
            "auto",
        ),
    },
    worker=False,
    defaults={"drain_seconds": 30.0},
)


async def _serve(options: ServeOptions) -> None:
    from prometheus_client import CollectorRegistry

    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import check_port, listen
    from kvasir_engine.api.http.server import serve as serve_app
    from kvasir_engine.api.lifecycle import Lifecycle
    from kvasir_engine.core.inprocess_client import InProcessClient
    from kvasir_engine.core.metrics import EngineCollector
    from kvasir_engine.entrypoints.build import build
    from kvasir_engine.entrypoints.front_end import api_files, front_end, served_model
    from kvasir_engine.supervisor import Supervisor, end_process

    config = options.config
    check_port(config.host, config.port)
    lifecycle, tasks = Lifecycle(), Supervisor(end_process)
    files = await api_files(options, lifecycle)
    thread, _ = await asyncio.to_thread(build, config, False, ended=end_process)
    model = await served_model(options, config.model, config.revision, weights=True)
    registry = CollectorRegistry()
    registry.register(EngineCollector(thread.engine))
    try:
        async with front_end(InProcessClient(thread), model, files, tasks, registry) as front:
            shutdown = GracefulShutdown(lifecycle, config.drain_seconds)
            sock = listen(config.host, config.port)
            log.info("serving model=%r address=%s:%d", options.name, *sock.getsockname()[:2])
            async with front.running_batches():
                await serve_app(front.app, sock, shutdown)
    finally:
        thread.stop()
        thread.engine.runner.close()
