"""`kvasir worker`: from the command line to a served port.

Imports of torch and NIXL wait until a command runs, so that `kvasir --help` is quick.
"""

import asyncio
import logging
from typing import Any

from kvasir_engine.config import EngineConfig, config_of
from kvasir_engine.entrypoints.options import command
from kvasir_engine.interruptible import run_interruptible
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
    run_interruptible(_worker(config))


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
    from kvasir_engine.entrypoints.worker_server import WorkerServer, hello_of
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
    server = WorkerServer(thread, hello_of(config, thread, handoff.endpoint), apart=credentials is not None)
    shutdown = GracefulShutdown(server, config.drain_seconds)
    server.show_status(shutdown)
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
        await serve(server.app, sock, shutdown, leave, secured=secured)
    finally:
        thread.stop()
        handoff.stop()
        thread.engine.runner.close()
