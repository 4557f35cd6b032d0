"""How every command logs: one line an event on stderr, `LEVEL component message key=value`."""

import logging
import sys


def log_to_stderr(level: int = logging.INFO, prefix: str = "") -> None:
    """Set up logging for this process. A client library's own lines appear from warnings on.

    `prefix` goes before every component.
    """
    logging.basicConfig(
        level=level, format=f"%(levelname)s {prefix}%(name)s %(message)s", stream=sys.stderr, force=True
    )
    for chatty in ("httpx", "httpcore", "websockets", "uvicorn", "asyncio", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
