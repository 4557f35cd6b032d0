"""`python -m e2e.node CONFIG.json`, in the cluster's namespace: agent and Service proxy until SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

import msgspec

from e2e.node.agent import Agent
from e2e.node.api import Api
from e2e.node.config import Config
from e2e.node.proxy import Proxy


async def run(config: Config) -> None:
    """Run until SIGTERM; returns when all pods are gone."""
    main = asyncio.current_task()
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    async with Api(config.kubeconfig) as api, asyncio.TaskGroup() as group:
        if config.proxy:
            group.create_task(Proxy(api, config.netns).run())
        group.create_task(Agent(api, config).run())


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = msgspec.json.decode(
        Path(sys.argv[1]).read_bytes(), type=Config, dec_hook=lambda kind, value: kind(value)
    )
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(run(config))


if __name__ == "__main__":
    main()
