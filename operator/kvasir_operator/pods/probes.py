"""Probes and hooks: single checks, and results by success and failure thresholds, as Kubernetes defines them."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from kvasir_operator.pods.environment import Launch
from kvasir_operator.pods.podspec import Exec, HttpGet, Probe, Sleep, TcpSocket
from kvasir_operator.pods.process import Process

_BODY_CHARS = 1000

#: Runs one action: `None` for success, else what went wrong.
Check = Callable[[], Awaitable[str | None]]


def http_client() -> httpx.AsyncClient:
    """A client like a kubelet's: a new connection for each probe, no proxy, no certificate check, no redirects."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(verify=False, trust_env=False, limits=limits, timeout=None)


async def perform(
    action: HttpGet | TcpSocket | Exec | Sleep,
    ip: str,
    client: httpx.AsyncClient,
    command: Callable[[Exec], Launch],
) -> str | None:
    """Run the action once, without a time limit of its own. Returns `None` for success, else the error."""
    match action:
        case HttpGet():
            host = action.host or ip
            url = f"{action.scheme}://{f'[{host}]' if ':' in host else host}:{action.port}{action.path}"
            headers = {"User-Agent": "kube-probe/kvasir", "Accept": "*/*", **dict(action.headers)}
            try:
                response = await client.get(url, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                return f"Get {url!r}: {error or type(error).__name__}"
            if 200 <= response.status_code < 400:
                return None
            body = response.text.strip()[:_BODY_CHARS]
            return f"HTTP probe failed with statuscode: {response.status_code}{f': {body}' if body else ''}"
        case TcpSocket():
            try:
                _, writer = await asyncio.open_connection(action.host or ip, action.port)
            except OSError as error:
                return f"dial tcp {action.host or ip}:{action.port}: {error.strerror or error}"
            writer.close()
            return None
        case Exec():
            return await _run(command(action))
        case Sleep():
            await asyncio.sleep(action.seconds)
            return None


async def _run(launch: Launch) -> str | None:
    lines: list[str] = []
    try:
        process = await Process.start(launch, lines.append)
    except OSError as error:
        return f"cannot run {launch.argv[0]}: {error.strerror}"
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise
    return None if code == 0 else f"command exited with {code}: {' '.join(lines)[-_BODY_CHARS:]}"


async def watch(
    probe: Probe, check: Check, report: Callable[[bool, str], None], started: float, at_once: bool = False
) -> None:
    """Check every period, and report each result that reaches its threshold; runs until cancelled.

    `started` is the container's start on the loop's clock, from which the initial delay counts. With `at_once`
    (the startup probe has just succeeded) the first check runs at once.
    """
    loop = asyncio.get_running_loop()
    due = max(started + probe.initial_delay, loop.time() if at_once else 0.0)
    last: bool | None = None
    run = 0
    while True:
        await asyncio.sleep(max(0.0, due - loop.time()))
        try:
            async with asyncio.timeout(probe.timeout):
                failure = await check()
        except TimeoutError:
            failure = f"timed out after {probe.timeout:g}s"
        ok = failure is None
        run = run + 1 if ok == last else 1
        last = ok
        if run >= (probe.success_threshold if ok else probe.failure_threshold):
            report(ok, failure or "")
        # Missed periods are dropped, not made up for.
        due = max(due + probe.period, loop.time())
