"""Doors from the host's loopback into a cluster's network namespace.

One thread that lives in the namespace runs an event loop. Listening sockets are made by the caller, on the host's
127.0.0.1; the connections onward are made by the thread, so inside. Nothing else crosses.
"""

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from e2e import netns
from e2e.relay import relay

T = TypeVar("T")


class Forwarder:
    """Forwards TCP connections of the host's loopback to addresses inside a namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._loop = asyncio.new_event_loop()
        self._ports: dict[tuple[str, int], int] = {}
        self._servers: list[asyncio.Server] = []
        self._failure: OSError | None = None
        entered = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(entered,), name=f"forward {namespace}", daemon=True)
        self._thread.start()
        entered.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self, entered: threading.Event) -> None:
        try:
            netns.enter_thread(self._namespace)
        except OSError as error:
            self._failure = error
            return
        finally:
            entered.set()
        self._loop.run_forever()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def port(self, host: str, port: int) -> int:
        """A port on the host's 127.0.0.1 that leads to `host:port` inside; the same one when asked again."""
        if (host, port) not in self._ports:
            listener = socket.create_server(("127.0.0.1", 0))
            self._call(self._serve(listener, host, port))
            self._ports[host, port] = listener.getsockname()[1]
        return self._ports[host, port]

    async def _serve(self, listener: socket.socket, host: str, port: int) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await relay(reader, writer, host, port)

        self._servers.append(await asyncio.start_server(connected, sock=listener))

    def close(self) -> None:
        """Close all doors and end the thread."""
        if not self._thread.is_alive():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
