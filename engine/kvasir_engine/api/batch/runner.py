"""Runs batches at lower priority than all other traffic, and resumes them after a restart."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import msgspec
from starlette.types import ASGIApp

from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.in_process import HttpAnswer, ask
from kvasir_engine.api.batch.input_lines import check, decoded, input_lines
from kvasir_engine.api.batch.line_writer import LineWriter
from kvasir_engine.api.batch.schemas import (
    ENDED,
    Batch,
    BatchRequest,
    InputLine,
    LineAnswer,
    LineError,
    LineErrors,
    OutputLine,
    RequestCounts,
)
from kvasir_engine.api.batch.stores import BatchStore, Change, ClaimLost, Gone, HeldJob, LinesName
from kvasir_engine.api.caller import Caller
from kvasir_engine.api.errors import ErrorDetail, bad_request
from kvasir_engine.api.lifecycle import Lifecycle

log = logging.getLogger("api")

BEHIND = 100
"""Batches' requests come so many levels of priority after others."""
_TRIES = 3  # of a request that fails for no fault of its own
_FIRST_WAIT, _MOST_WAIT = 0.5, 30.0  # while there is no room for a request, or no worker
_AGAIN = 30.0  # after the disk or the object store failed


class _Streams(msgspec.Struct, frozen=True):
    stream: bool | None = None


class BatchRunner:
    """The files and batches of one store. Start it with the application that answers their requests."""

    def __init__(
        self,
        store: BatchStore,
        lifecycle: Lifecycle,
        limits: BatchLimits | None = None,
        wait: float = _FIRST_WAIT,
    ) -> None:
        self.limits = limits or BatchLimits()
        self.store = store
        self.files = store.files
        self.jobs = store.jobs
        self._lifecycle = lifecycle
        self._wait = wait
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._news = asyncio.Event()
        self._running: set[str] = set()

    async def run(self, app: ASGIApp, most_bytes: Callable[[], int]) -> None:
        """Run all present and future batches. `most_bytes`: the limit of a request."""
        tidied = False
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                try:
                    if not tidied:
                        await self.store.tidy()
                        tidied = True
                    await self._start_more(group, app, most_bytes)
                except OSError as error:
                    log.error("the batches cannot be read reason=%r", str(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.jobs.poll_seconds):
                        await self._news.wait()

    async def _start_more(self, group: asyncio.TaskGroup, app: ASGIApp, most_bytes: Callable[[], int]) -> None:
        if self._lifecycle.draining or len(self._running) >= self.limits.running:
            return
        for owned in await self.jobs.unfinished():
            id = owned.batch.id
            if id in self._running or len(self._running) >= self.limits.running or self._lifecycle.draining:
                continue
            held = await self.jobs.claim(owned)
            if held is not None:
                self._running.add(id)
                group.create_task(self._work(app, held, most_bytes()))

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

    async def create(self, owner: str, request: BatchRequest) -> Batch:
        """A new batch. Raises ApiError, OSError."""
        await self.files.get(owner, request.input_file_id)
        await self.jobs.check_room(owner)
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            status="validating",
            created_at=now,
            expires_at=now + self.limits.seconds,
            metadata=request.metadata,
        )
        await self.jobs.create(owner, batch)
        self._news.set()
        return batch

    async def cancel(self, owner: str, id: str) -> Batch:
        """End a batch early, and keep the answers so far. Raises ApiError, OSError."""
        batch = await self.jobs.change(owner, id, _cancelled)
        self._news.set()
        return batch

    async def _work(self, app: ASGIApp, held: HeldJob, most_bytes: int) -> None:
        id = held.batch.id
        keeping = asyncio.create_task(held.keep())
        try:
            await self._steps(app, held, most_bytes)
        except ClaimLost:
            log.warning("another process runs a batch now id=%s", id)
        except OSError as error:
            log.error("a batch waits for its store id=%s reason=%r", id, str(error))
            await asyncio.sleep(_AGAIN)
        except Gone as error:
            log.error("a batch failed id=%s reason=%r", id, str(error))
            await self._fail(held, LineError(error.code, str(error)))
        except Exception as error:
            log.exception("a batch failed id=%s", id)
            await self._fail(held, LineError("server_error", f"{type(error).__name__}"))
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await held.release()
            self._running.discard(id)
            self._news.set()

    async def _fail(self, held: HeldJob, error: LineError) -> None:
        try:
            await held.update(_set(status="failed", failed_at=int(time.time()), errors=LineErrors([error])))
        except (OSError, ClaimLost) as failed:
            log.error("a batch's failure is not written id=%s reason=%r", held.batch.id, str(failed))
            await asyncio.sleep(_AGAIN)

    async def _steps(self, app: ASGIApp, held: HeldJob, most_bytes: int) -> None:
        if held.batch.status == "validating" and not await self._validate(held, most_bytes):
            return
        if held.batch.status == "in_progress":
            left = await self._until_over(app, held)
            if left:
                return
        batch = held.batch
        if batch.status == "in_progress":
            expired = time.time() >= batch.expires_at and batch.request_counts.total > _ended(batch)
            await held.update(_set(expired_at=int(time.time()) if expired else None))
        await self._finish(held)

    async def _validate(self, held: HeldJob, most_bytes: int) -> bool:
        endpoint = held.batch.endpoint
        try:
            async with held.input() as path:
                total, errors = await asyncio.to_thread(check, path, endpoint, self.limits.lines, most_bytes)
        except Gone as error:
            total, errors = 0, [LineError(error.code, str(error))]
        now = int(time.time())
        if errors:
            await held.update(_set(status="failed", failed_at=now, errors=LineErrors(errors)))
            return False

        def checked(batch: Batch) -> Batch:
            batch = msgspec.structs.replace(batch, request_counts=RequestCounts(total))
            if batch.status != "validating":  # cancelled meanwhile
                return batch
            return msgspec.structs.replace(batch, status="in_progress", in_progress_at=now)

        await held.update(checked)
        return True

    async def _until_over(self, app: ASGIApp, held: HeldJob) -> bool:
        """Send requests until all are answered, or the batch is cancelled, expired or another process's. True: the
        process ends before that.
        """
        asking = asyncio.create_task(self._ask_all(app, held))
        stopped = asyncio.create_task(held.stopped.wait())
        try:
            await asyncio.wait(
                {asking, stopped},
                timeout=max(0.0, held.batch.expires_at - time.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            return asking.done() and asking.result()
        finally:
            asking.cancel()
            stopped.cancel()
            await asyncio.gather(asking, stopped, return_exceptions=True)

    async def _ask_all(self, app: ASGIApp, held: HeldJob) -> bool:
        good, bad = await held.answered()
        writer = LineWriter(held.append, held.linger)
        writing = asyncio.create_task(writer.run())
        caller = Caller(held.owner, BEHIND, in_background=True)
        try:
            async with held.input() as path, asyncio.TaskGroup() as group:
                for _, line in input_lines(path):
                    request = decoded(line)
                    if request.custom_id in good or request.custom_id in bad:
                        continue
                    await self._slots.acquire()
                    if self._lifecycle.draining or writing.done():
                        self._slots.release()
                        break
                    group.create_task(self._ask_one(app, caller, request, writer))
        finally:
            writer.close()
            await writing
        return self._lifecycle.draining and _ended(held.batch) < held.batch.request_counts.total

    async def _ask_one(self, app: ASGIApp, caller: Caller, request: InputLine, writer: LineWriter) -> None:
        try:
            got = await self._ask_with_retries(app, caller, request)
        finally:
            self._slots.release()
        answer = LineAnswer(got.status, f"req_{secrets.token_hex(12)}", msgspec.Raw(got.body))
        line = OutputLine(f"batch_req_{secrets.token_hex(12)}", request.custom_id, answer, None)
        writer.put(line, failed=got.status != 200)

    async def _ask_with_retries(self, app: ASGIApp, caller: Caller, request: InputLine) -> HttpAnswer:
        """The answer to one request; retries until the batch expires while no worker is available."""
        body = bytes(request.body)
        if _streams(body):
            error = bad_request("'stream' is not supported in a batch.", "stream", "unsupported_value")
            return HttpAnswer(error.status, error.body)
        wait, tries = self._wait, 0
        while True:
            got = await ask(app, request.url, body, caller)
            if got.status < 500:
                return got
            tries += got.status != 503
            if tries >= _TRIES:
                return got
            await asyncio.sleep(wait)
            wait = min(_MOST_WAIT, 2 * wait)

    async def _finish(self, held: HeldJob) -> None:
        """Write an error line for each unsent request, and create the output files. Idempotent after a crash."""
        batch = held.batch
        if batch.status != "finalizing":
            why = None
            if batch.cancelling_at is not None:
                why = ErrorDetail("The batch was cancelled before this request was answered.", "batch_cancelled")
            elif batch.expired_at is not None:
                why = ErrorDetail("The batch expired before this request was answered.", "batch_expired")
            if why is not None and batch.in_progress_at is not None:
                await self._give_up(held, msgspec.structs.replace(why, code=why.type))
            batch = await held.update(
                _set(
                    status="finalizing",
                    finalizing_at=int(time.time()),
                    output_file_id=_new_file(await held.written("output")),
                    error_file_id=_new_file(await held.written("errors")),
                )
            )
        names: tuple[LinesName, ...] = get_args(LinesName)
        for name, id in zip(names, (batch.output_file_id, batch.error_file_id), strict=True):
            if id is not None:
                await held.publish(name, id)
        await held.clear()
        status = "cancelled" if batch.cancelling_at else "expired" if batch.expired_at else "completed"
        await held.update(_set(**{"status": status, f"{status}_at": int(time.time())}))
        log.info("a batch has ended id=%s status=%s", batch.id, status)

    async def _give_up(self, held: HeldJob, why: ErrorDetail) -> None:
        good, bad = await held.answered()
        writer = LineWriter(held.append)
        async with held.input() as path:
            for _, line in input_lines(path):
                id = decoded(line).custom_id
                if id not in good and id not in bad:
                    writer.put(OutputLine(f"batch_req_{secrets.token_hex(12)}", id, None, why), failed=True)
        writer.close()
        await writer.run()


def _set(**changes: Any) -> Change:
    return lambda batch: msgspec.structs.replace(batch, **changes)


def _cancelled(batch: Batch) -> Batch:
    """Raises ApiError."""
    if batch.status == "cancelling":
        return batch
    if batch.status in ENDED or batch.status == "finalizing":
        raise bad_request(f"Cannot cancel a batch with status '{batch.status}'.", "id")
    return msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(time.time()))


def _ended(batch: Batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def _new_file(needed: bool) -> str | None:
    return f"file-{secrets.token_hex(12)}" if needed else None


def _streams(body: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streams).stream)
    except msgspec.ValidationError:
        return False  # the endpoint says what is wrong
