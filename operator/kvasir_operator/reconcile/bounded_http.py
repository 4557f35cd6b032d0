"""HTTP answers of limited size in limited time, for questions to those who may be hostile: pods, and the model hub.

httpx's own timeouts are of each read, so a byte a second holds a caller for as long as it likes. Here one deadline
covers name, connection, headers and body.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import httpx

AGENT = "kvasir-operator"
MOST_REDIRECTS = 3
PARALLEL = 64

T = TypeVar("T")


class Unanswered(Exception):
    """No answer of use came within the bounds; the message says why."""


class BoundedHttp:
    """Gets `most` bytes at most within `seconds`. For threads: each call has an event loop of its own.

    Redirects are followed within the same origin, and only with `redirects`. `proxies`: whether the environment's
    are used. `transport` is for tests.
    """

    def __init__(
        self,
        most: int,
        seconds: float,
        *,
        redirects: bool = False,
        proxies: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._most = most
        self._seconds = seconds
        self._redirects = redirects
        self._proxies = proxies
        self._transport = transport

    def get(self, url: str) -> bytes:
        """The body of a successful answer. Raises Unanswered."""
        (body,) = self.get_all([url], self._seconds)
        if isinstance(body, Unanswered):
            raise body
        return body

    def get_all(self, urls: Sequence[str], seconds: float) -> list[bytes | Unanswered]:
        """What each answers, asked `PARALLEL` at a time, in order; all within `seconds` too."""
        return asyncio.run(self._get_all(urls, seconds)) if urls else []

    async def _get_all(self, urls: Sequence[str], seconds: float) -> list[bytes | Unanswered]:
        slots = asyncio.Semaphore(PARALLEL)
        verify = any(url.startswith("https:") for url in urls)  # certificates take long to load
        async with httpx.AsyncClient(
            timeout=None,
            verify=verify,
            trust_env=self._proxies,
            transport=self._transport,
            headers={"accept-encoding": "identity", "user-agent": AGENT},  # what is compressed may be of any size
            limits=httpx.Limits(max_keepalive_connections=0),
        ) as client:

            async def one(url: str) -> bytes:
                async with slots, asyncio.timeout(self._seconds):
                    return await self._get(client, url)

            tasks = [asyncio.create_task(_caught(lambda url=url: one(url))) for url in urls]  # type: ignore[misc]
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
            return [Unanswered("no time was left") if task in late else task.result() for task in tasks]

    async def _get(self, client: httpx.AsyncClient, url: str) -> bytes:
        for _ in range(1 + MOST_REDIRECTS * self._redirects):
            async with client.stream("GET", url) as answer:
                if answer.is_success:
                    return await self._body(answer)
                if not (self._redirects and answer.has_redirect_location):
                    raise Unanswered(f"HTTP {answer.status_code}")
                there = answer.url.join(answer.headers["location"])
                if _origin(there) != _origin(answer.url):
                    raise Unanswered(f"a redirect to another host: {str(there)[:200]}")
                url = str(there)
        raise Unanswered("too many redirects")

    async def _body(self, answer: httpx.Response) -> bytes:
        if "content-encoding" in answer.headers:
            raise Unanswered("a compressed answer, which nobody asked for")
        body = bytearray()
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > self._most:
                raise Unanswered(f"more than {self._most} bytes")
        return bytes(body)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


async def _caught(work: Callable[[], Awaitable[bytes]]) -> bytes | Unanswered:
    try:
        return await work()
    except Unanswered as error:
        return error
    except TimeoutError:
        return Unanswered("no whole answer in time")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return Unanswered(f"{type(error).__name__}: {error}"[:300])
