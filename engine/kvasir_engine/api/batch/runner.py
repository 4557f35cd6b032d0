"""Runs batches at lower priority than all other traffic, and resumes them after a restart."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import ASGIApp

from kvasir_engine.api.batch.file_store import FileStore
from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits
from kvasir_engine.api.batch.in_process import HttpAnswer, ask
from kvasir_engine.api.batch.input_lines import answered, check, decoded, input_lines
from kvasir_engine.api.batch.job_store import JobStore
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
from kvasir_engine.api.caller import Caller
from kvasir_engine.api.errors import ApiError, ErrorDetail, bad_request
from kvasir_engine.api.lifecycle import Lifecycle

log = logging.getLogger("api")

BEHIND = 100
"""Batches' requests come so many levels of priority after others."""
_TRIES = 3  # of a request that fails for no fault of its own
_FIRST_WAIT, _MOST_WAIT = 0.5, 30.0  # while there is no room for a request, or no worker
_AGAIN = 30.0  # after the disk failed


class _Streams(msgspec.Struct, frozen=True):
    stream: bool | None = None


class BatchRunner:
    """The files and batches of one folder. Start it with the application that answers their requests."""

    def __init__(
        self,
        folder: BatchFolder,
        lifecycle: Lifecycle,
        limits: BatchLimits | None = None,
        wait: float = _FIRST_WAIT,
    ) -> None:
        self.limits = limits or BatchLimits()
        self._folder = folder
        self.files = FileStore(folder, self.limits)
        self.jobs = JobStore(folder, self.limits)
        self._lifecycle = lifecycle
        self._wait = wait
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._news = asyncio.Event()
        self._cancelled: dict[str, asyncio.Event] = {}
        self._running: set[str] = set()

    async def run(self, app: ASGIApp, most_bytes: Callable[[], int]) -> None:
        """Run all present and future batches. `most_bytes`: the limit of a request."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                for owned in self.jobs.unfinished():
                    id = owned.batch.id
                    if id in self._running or len(self._running) >= self.limits.running:
                        continue
                    if not self._lifecycle.draining:
                        self._running.add(id)
                        group.create_task(self._work(app, owned.owner, id, most_bytes()))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_AGAIN):
                        await self._news.wait()

    def close(self) -> None:
        """Unlock the folder for other processes."""
        self._folder.close()

    def create(self, owner: str, request: BatchRequest) -> Batch:
        """A new batch. Raises ApiError, OSError."""
        self.files.get(owner, request.input_file_id)
        self.jobs.check_room(owner)
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
        self.jobs.save(owner, batch)
        self._news.set()
        return batch

    def cancel(self, owner: str, id: str) -> Batch:
        """End a batch early, and keep the answers so far. Raises ApiError, OSError."""
        batch = self.jobs.get(owner, id)
        if batch.status == "cancelling":
            return batch
        if batch.status in ENDED or batch.status == "finalizing":
            raise bad_request(f"Cannot cancel a batch with status '{batch.status}'.", "id")
        batch = self._update(owner, id, status="cancelling", cancelling_at=int(time.time()))
        self._event(id).set()
        self._news.set()
        return batch

    def _event(self, id: str) -> asyncio.Event:
        return self._cancelled.setdefault(id, asyncio.Event())

    def _update(self, owner: str, id: str, **changes: Any) -> Batch:
        batch = msgspec.structs.replace(self.jobs.get(owner, id), **changes)
        self.jobs.save(owner, batch)
        return batch

    async def _work(self, app: ASGIApp, owner: str, id: str, most_bytes: int) -> None:
        try:
            await self._steps(app, owner, id, most_bytes)
        except OSError as error:
            log.error("a batch waits for its disk id=%s reason=%r", id, str(error))
            await asyncio.sleep(_AGAIN)
        except Exception as error:
            log.exception("a batch failed id=%s", id)
            errors = LineErrors([LineError("server_error", f"{type(error).__name__}")])
            with suppress(OSError):
                self._update(owner, id, status="failed", failed_at=int(time.time()), errors=errors)
        finally:
            self._running.discard(id)
            self._news.set()

    async def _steps(self, app: ASGIApp, owner: str, id: str, most_bytes: int) -> None:
        batch = self.jobs.get(owner, id)
        if batch.status == "validating" and not await self._validate(owner, batch, most_bytes):
            return
        batch = self.jobs.get(owner, id)
        if batch.status == "in_progress":
            left = await self._until_over(app, owner, batch)
            if left:
                return
        batch = self.jobs.get(owner, id)
        if batch.status == "in_progress":
            expired = time.time() >= batch.expires_at and batch.request_counts.total > _ended(batch)
            batch = self._update(owner, id, expired_at=int(time.time()) if expired else None)
        await self._finish(owner, batch)
        self._cancelled.pop(id, None)

    async def _validate(self, owner: str, batch: Batch, most_bytes: int) -> bool:
        path = self.files.data(batch.input_file_id)
        try:
            total, errors = await asyncio.to_thread(check, path, batch.endpoint, self.limits.lines, most_bytes)
        except FileNotFoundError:
            total, errors = 0, [LineError("file_not_found", "The input file is gone.")]
        now = int(time.time())
        if errors:
            self._update(owner, batch.id, status="failed", failed_at=now, errors=LineErrors(errors))
            return False
        counts = RequestCounts(total)
        if self.jobs.get(owner, batch.id).status == "validating":
            self._update(owner, batch.id, status="in_progress", in_progress_at=now, request_counts=counts)
        else:  # cancelled meanwhile
            self._update(owner, batch.id, request_counts=counts)
        return True

    async def _until_over(self, app: ASGIApp, owner: str, batch: Batch) -> bool:
        """Send requests until all are answered, or the batch is cancelled or expires. True: the process ends before
        that.
        """
        asking = asyncio.create_task(self._ask_all(app, owner, batch))
        cancelled = asyncio.create_task(self._event(batch.id).wait())
        try:
            await asyncio.wait(
                {asking, cancelled},
                timeout=max(0.0, batch.expires_at - time.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            return asking.done() and asking.result()
        finally:
            asking.cancel()
            cancelled.cancel()
            await asyncio.gather(asking, cancelled, return_exceptions=True)

    async def _ask_all(self, app: ASGIApp, owner: str, batch: Batch) -> bool:
        output, errors = self.jobs.output(batch.id), self.jobs.errors(batch.id)
        good, bad = await asyncio.to_thread(lambda: (answered(output), answered(errors)))
        self._note(owner, batch.id, len(good), len(bad))
        writer = LineWriter(output, errors, lambda more, failed: self._add(owner, batch.id, more, failed))
        writing = asyncio.create_task(writer.run())
        caller = Caller(owner, BEHIND, in_background=True)
        try:
            async with asyncio.TaskGroup() as group:
                for _, line in input_lines(self.files.data(batch.input_file_id)):
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
        return self._lifecycle.draining and _ended(self.jobs.get(owner, batch.id)) < batch.request_counts.total

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

    def _note(self, owner: str, id: str, completed: int, failed: int) -> None:
        batch = self.jobs.get(owner, id)
        counts = RequestCounts(batch.request_counts.total, completed, failed)
        self.jobs.note(owner, msgspec.structs.replace(batch, request_counts=counts))

    def _add(self, owner: str, id: str, completed: int, failed: int) -> None:
        counts = self.jobs.get(owner, id).request_counts
        self._note(owner, id, counts.completed + completed, counts.failed + failed)

    async def _finish(self, owner: str, batch: Batch) -> None:
        """Write an error line for each unsent request, and create the output files. Idempotent after a crash."""
        if batch.status != "finalizing":
            why = None
            if batch.cancelling_at is not None:
                why = ErrorDetail("The batch was cancelled before this request was answered.", "batch_cancelled")
            elif batch.expired_at is not None:
                why = ErrorDetail("The batch expired before this request was answered.", "batch_expired")
            if why is not None and batch.in_progress_at is not None:
                await self._give_up(owner, batch, msgspec.structs.replace(why, code=why.type))
            batch = self._update(
                owner,
                batch.id,
                status="finalizing",
                finalizing_at=int(time.time()),
                output_file_id=_new_file(self.jobs.output(batch.id).exists()),
                error_file_id=_new_file(self.jobs.errors(batch.id).exists()),
            )
        for name, id, path in (
            ("output", batch.output_file_id, self.jobs.output(batch.id)),
            ("errors", batch.error_file_id, self.jobs.errors(batch.id)),
        ):
            if id is not None:
                await asyncio.to_thread(self.files.add, owner, path, f"{batch.id}_{name}.jsonl", "batch_output", id)
        status = "cancelled" if batch.cancelling_at else "expired" if batch.expired_at else "completed"
        self._update(owner, batch.id, **{"status": status, f"{status}_at": int(time.time())})
        log.info("a batch has ended id=%s status=%s", batch.id, status)

    async def _give_up(self, owner: str, batch: Batch, why: ErrorDetail) -> None:
        output, errors = self.jobs.output(batch.id), self.jobs.errors(batch.id)
        writer = LineWriter(output, errors, lambda more, failed: self._add(owner, batch.id, more, failed))
        known = await asyncio.to_thread(lambda: answered(output) | answered(errors))
        for _, line in input_lines(self.files.data(batch.input_file_id)):
            id = decoded(line).custom_id
            if id not in known:
                writer.put(OutputLine(f"batch_req_{secrets.token_hex(12)}", id, None, why), failed=True)
        writer.close()
        await writer.run()


def _ended(batch: Batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def _new_file(needed: bool) -> str | None:
    return f"file-{secrets.token_hex(12)}" if needed else None


def _streams(body: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streams).stream)
    except msgspec.ValidationError:
        return False  # the endpoint says what is wrong


def refuse_endpoint(endpoint: str, served: frozenset[str]) -> None:
    """Raise ApiError for an endpoint that batches cannot use."""
    if endpoint not in served:
        shown = ", ".join(sorted(served))
        raise ApiError(
            400,
            f"Invalid value for 'endpoint': expected one of {shown}, but got '{endpoint[:100]}' instead.",
            param="endpoint",
            code="invalid_value",
        )
