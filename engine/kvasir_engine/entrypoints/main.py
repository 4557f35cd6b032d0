"""The first lines of the `kvasir` program."""

import os
import signal


def main() -> None:
    """Run the command line (`cli.py`), as one that can be stopped from its beginning on.

    The kernel spares a container's first process a signal that it has no handler for: a pod deleted while its
    worker imports or loads would be there until the end of its grace period. That happens to a group of pods of
    which one ended: its containers are started again right before its pods are deleted.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    from kvasir_engine.entrypoints.cli import main

    main()
