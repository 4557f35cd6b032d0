"""The first lines of the `kvasir` program."""

import os
import signal


def main() -> None:
    """Run the command line (`cli.py`), with SIGTERM handled from the start.

    The kernel does not deliver a signal without a handler to a container's first process: a pod deleted while its
    worker imports or loads would stay until its grace period ends. That happens to a group of pods of which one
    ended: its containers are restarted right before its pods are deleted.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    from kvasir_engine.entrypoints.cli import main

    main()
