"""`python -m e2e.lws KUBECONFIG`, in the cluster's namespace: the controller until SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

from e2e.lws.controller import Controller
from e2e.node.api import Api


async def run(kubeconfig: Path) -> None:
    """Run until SIGTERM."""
    main = asyncio.current_task()
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    async with Api(kubeconfig) as api:
        await Controller(api).run()


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(run(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
