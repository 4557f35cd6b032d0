"""`kvasir router`: from the command line to a served port."""

import asyncio
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from kvasir_engine.api.batch.folder import BATCH_HELP
from kvasir_engine.api.json_whitespace import WHITESPACE_HELP, WHITESPACE_VARIABLE, json_whitespace
from kvasir_engine.api.special_token_policy import PARSE_HELP, ParseSpecial, parse_special
from kvasir_engine.api.tools.flags import (
    AUTO,
    REASONING_HELP,
    REASONING_VARIABLE,
    TOOL_HELP,
    TOOL_VARIABLE,
    Parsers,
    parsers,
)
from kvasir_engine.entrypoints.torchless import without_torch
from kvasir_engine.interruptible import run_interruptible

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from kvasir_engine.router.pool import WorkerPool

log = logging.getLogger("router")


@dataclass(frozen=True)
class RouterOptions:
    """What the command line says; `watch_pods` is a label selector, `max_length` 0 the workers' own."""

    model: str
    revision: str = ""
    served_model_name: str = ""
    max_length: int = 0
    host: str = "0.0.0.0"
    port: int = 8000
    workers: list[str] = field(default_factory=list)
    watch_pods: str = ""
    watch_owner: str = ""
    namespace: str = ""
    api_keys_file: str = ""
    batch_dir: str = ""
    parse_special_tokens: ParseSpecial = "prompts"
    json_whitespace: str | None = None
    parsers: Parsers = AUTO
    remote_threshold: int = 32
    drain_seconds: float = 600.0
    hold_seconds: float = 0.0
    hold_requests: int = 1000
    tls_dir: str = ""
    plain_workers: bool = False

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or self.model


def router(
    model: Annotated[
        str, typer.Option(help="hf://org/name[@rev], file:///path or package://name", envvar="KVASIR_MODEL")
    ],
    revision: Annotated[str, typer.Option(help="of a hub model", envvar="KVASIR_REVISION")] = "",
    served_model_name: Annotated[
        str, typer.Option(help="the name in the API", envvar="KVASIR_SERVED_MODEL_NAME")
    ] = "",
    max_length: Annotated[
        int, typer.Option(min=0, help="most tokens of a sequence, 0: the workers' own", envvar="KVASIR_MAX_LENGTH")
    ] = 0,
    host: Annotated[str, typer.Option(envvar="KVASIR_HOST")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one", envvar="KVASIR_PORT")] = 8000,
    worker: Annotated[
        list[str] | None, typer.Option(help="a worker's http://host:port; repeat it", envvar="KVASIR_WORKER")
    ] = None,
    watch_pods: Annotated[
        str, typer.Option(help="find workers as pods with these labels", envvar="KVASIR_WATCH_PODS")
    ] = "",
    watch_owner: Annotated[
        str,
        typer.Option(
            help="uid of the InferenceService whose pods they have to be, default: anybody's",
            envvar="KVASIR_WATCH_OWNER",
        ),
    ] = "",
    namespace: Annotated[
        str, typer.Option(help="of the pods to watch, default: this pod's own", envvar="KVASIR_NAMESPACE")
    ] = "",
    api_keys_file: Annotated[
        str,
        typer.Option(help="one key a line, or a directory with a file a key", envvar="KVASIR_API_KEYS_FILE"),
    ] = "",
    batch_dir: Annotated[str, typer.Option(help=BATCH_HELP, envvar="KVASIR_BATCH_DIR")] = "",
    parse_special_tokens: Annotated[
        str, typer.Option(help=PARSE_HELP, envvar="KVASIR_PARSE_SPECIAL_TOKENS")
    ] = "prompts",
    tool_call_parser: Annotated[str, typer.Option(help=TOOL_HELP, envvar=TOOL_VARIABLE)] = "auto",
    reasoning_parser: Annotated[str, typer.Option(help=REASONING_HELP, envvar=REASONING_VARIABLE)] = "auto",
    whitespace: Annotated[
        str, typer.Option("--json-whitespace", help=WHITESPACE_HELP, envvar=WHITESPACE_VARIABLE)
    ] = "any",
    remote_threshold: Annotated[
        int,
        typer.Option(
            min=0,
            help="a prompt that a decode worker lacks fewer tokens of is not sent to prefill",
            envvar="KVASIR_REMOTE_THRESHOLD",
        ),
    ] = 32,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="to finish what runs", envvar="KVASIR_DRAIN_SECONDS")
    ] = 600.0,
    hold_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="to hold requests while no worker is known, where one is started for them; 0: refuse them",
            envvar="KVASIR_HOLD_SECONDS",
        ),
    ] = 0.0,
    hold_requests: Annotated[
        int, typer.Option(min=1, help="most requests that are held", envvar="KVASIR_HOLD_REQUESTS")
    ] = 1000,
    tls_dir: Annotated[
        str,
        typer.Option(
            help="folder of ca.crt, tls.crt and tls.key: workers have to show a certificate of the same "
            "InferenceService; looked at again when it changes",
            envvar="KVASIR_TLS_DIR",
        ),
    ] = "",
    plain_workers: Annotated[
        bool,
        typer.Option(
            help="with --tls-dir: take workers without TLS too, while a rollout brings it",
            envvar="KVASIR_PLAIN_WORKERS",
        ),
    ] = False,
) -> None:
    """The OpenAI API over a pool of workers."""
    options = RouterOptions(
        model=model,
        revision=revision,
        served_model_name=served_model_name,
        max_length=max_length,
        host=host,
        port=port,
        workers=worker or [],
        watch_pods=watch_pods,
        watch_owner=watch_owner,
        namespace=namespace,
        api_keys_file=api_keys_file,
        batch_dir=batch_dir,
        parse_special_tokens=parse_special(parse_special_tokens),
        parsers=parsers(tool_call_parser, reasoning_parser),
        json_whitespace=json_whitespace(whitespace),
        remote_threshold=remote_threshold,
        drain_seconds=drain_seconds,
        hold_seconds=hold_seconds,
        hold_requests=hold_requests,
        tls_dir=tls_dir,
        plain_workers=plain_workers,
    )
    without_torch()
    run_interruptible(run_router(options))


async def run_router(options: RouterOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises ModelError, TokenizerError, DiscoveryError or PortTaken."""
    from prometheus_client import CollectorRegistry

    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import check_port, listen, serve
    from kvasir_engine.api.lifecycle import Lifecycle
    from kvasir_engine.entrypoints.front_end import api_files, front_end, served_model
    from kvasir_engine.router.canary import PairVerifier
    from kvasir_engine.router.client import PooledClient
    from kvasir_engine.router.discovery import (
        ClusterAccess,
        DiscoveryError,
        static_workers,
        watched_pods,
        worker_ports,
        worker_url,
    )
    from kvasir_engine.router.pool import WorkerPool
    from kvasir_engine.router.status_endpoint import show_status
    from kvasir_engine.router.worker_trust import WorkerTrust
    from kvasir_engine.supervisor import Supervisor, end_process
    from kvasir_engine.tls import check_role, credentials_of

    if bool(options.workers) == bool(options.watch_pods):
        raise DiscoveryError("name the workers with --worker or with --watch-pods, one of the two")
    if options.plain_workers and not options.tls_dir:
        raise DiscoveryError("--plain-workers is for a router with --tls-dir: without, all workers are plain")
    credentials = credentials_of(options.tls_dir)
    if credentials is not None:
        check_role(credentials, "router")
    if options.watch_pods:
        access = ClusterAccess.in_cluster(options.namespace or None)
        ports = worker_ports(bool(options.tls_dir), options.plain_workers)
        discovery = watched_pods(access, options.watch_pods, options.watch_owner, ports)
    elif options.watch_owner:
        raise DiscoveryError("--watch-owner is for --watch-pods: workers given by URL have no owner")
    else:
        discovery = static_workers([worker_url(url) for url in options.workers])
    check_port(options.host, options.port)
    lifecycle = Lifecycle()
    files = await api_files(options, lifecycle)
    model = await served_model(options, options.model, options.revision)
    tasks = Supervisor(lambda reason: log.critical("the router ends reason=%r", reason))
    registry = CollectorRegistry()
    pool = WorkerPool(options.name, tasks, WorkerTrust(credentials, options.plain_workers))
    client = PooledClient(
        pool,
        registry=registry,
        remote_threshold=options.remote_threshold,
        max_length=options.max_length,
        hold_seconds=options.hold_seconds,
        hold_requests=options.hold_requests,
    )
    verifier = PairVerifier(pool, client.canary, client.quarantine, registry)
    following = tasks.start(_follow(pool, discovery), "discovery of workers")
    verifying = tasks.start(verifier.run(), "verifying of pairs")
    try:
        threads = max(2, min(8, os.cpu_count() or 1))
        async with front_end(
            client, model, files, tasks, registry, threads=threads, over=lambda: tasks.reason
        ) as front:
            shutdown = GracefulShutdown(lifecycle, options.drain_seconds)
            show_status(front.app, verifier, client, lifecycle)
            sock = listen(options.host, options.port)
            log.info("serving model=%r address=%s:%d", options.name, *sock.getsockname()[:2])
            async with front.running_batches():
                await serve(front.app, sock, shutdown, tasks.over)
    finally:
        await client.close()
        await tasks.stop(following, verifying)
        await pool.close()
    if tasks.reason is not None:
        end_process(tasks.reason)


async def _follow(pool: "WorkerPool", discovery: "AsyncIterator[Mapping[str, str]]") -> None:
    """As WorkerPool.follow, but never returns: a discovery of fixed URLs ends, the pool does not."""
    await pool.follow(discovery)
    await asyncio.Event().wait()
