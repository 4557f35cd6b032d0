"""What several processes do with the files and batches of one object store, and what a failing store does."""

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from api_support import ScriptedEngine, running, saying, store_at
from object_server import ObjectServer
from openai import AsyncOpenAI
from test_batches import Counting, content, counted, ended, line, lines_of, submitted

from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.objects import bucket as bucket_module
from kvasir_engine.api.batch.objects.bucket import Bucket, Taken
from kvasir_engine.api.batch.objects.held_job import HeldObjectJob
from kvasir_engine.api.batch.objects.jobs import ObjectJobs
from kvasir_engine.api.batch.objects.records import CLAIM_SECONDS, LinesPart, StoredJob
from kvasir_engine.api.batch.objects.store import ObjectStore, check_bucket, open_store
from kvasir_engine.api.batch.schemas import Batch, OwnedBatch, RequestCounts
from kvasir_engine.api.batch.stores import ClaimLost, StoreError
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.errors import UserError

BATCH = Batch(
    id=f"batch_{0:024x}",
    endpoint="/v1/completions",
    input_file_id=f"file-{0:024x}",
    status="in_progress",
    created_at=1,
    expires_at=2**40,
    in_progress_at=1,
    request_counts=RequestCounts(3),
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def jobs_of(bucket: str, clock: Clock | None = None) -> Iterator[ObjectJobs]:
    store = ObjectStore(Bucket(bucket))
    try:
        yield ObjectJobs(Bucket(bucket), store.files, BatchLimits(), clock or Clock(), linger=0.0)
    finally:
        store.close()


async def the_only(jobs: ObjectJobs) -> OwnedBatch:
    (owned,) = await jobs.unfinished()
    return owned


async def claimed(jobs: ObjectJobs) -> HeldObjectJob:
    held = await jobs.claim(await the_only(jobs))
    assert held is not None
    return held


def answer(id: str) -> bytes:
    return json.dumps({"custom_id": id}).encode() + b"\n"


async def test_of_many_claims_at_once_one_succeeds(bucket: str) -> None:
    with contextlib.ExitStack() as stack:
        routers = [stack.enter_context(jobs_of(bucket)) for _ in range(6)]
        await routers[0].create("", BATCH)
        found = await asyncio.gather(*(jobs.claim(OwnedBatch("", BATCH)) for jobs in routers))
        assert len([held for held in found if held is not None]) == 1
        assert [
            await jobs.claim(OwnedBatch("", BATCH)) for jobs, held in zip(routers, found, strict=True) if not held
        ] == [None] * 5


async def test_a_silent_routers_batch_goes_on_elsewhere_and_what_the_first_writes_later_does_not_count(
    bucket: str,
) -> None:
    clock = Clock()
    with jobs_of(bucket) as first, jobs_of(bucket, clock) as second:
        await first.create("", BATCH)
        mine = await claimed(first)
        await mine.append([answer("a")], [])
        assert await second.claim(await the_only(second)) is None
        clock.now += CLAIM_SECONDS - 1
        await mine.beat()
        assert await second.claim(await the_only(second)) is None
        clock.now += CLAIM_SECONDS - 1
        assert await second.claim(await the_only(second)) is None
        clock.now += 1
        other = await claimed(second)
        assert await other.answered() == ({"a"}, set())
        with pytest.raises(ClaimLost):
            await mine.append([answer("b")], [])  # grows the part that the other has read
        assert mine.stopped.is_set()
        with pytest.raises(ClaimLost):
            await mine.update(lambda batch: batch)
        await mine.release()
        await other.append([answer("b")], [answer("c")])
        assert await other.answered() == ({"a", "b"}, {"c"})
        assert other.batch.request_counts == RequestCounts(3, 2, 1)
        await other.release()
        again = await claimed(first)
        assert await again.answered() == ({"a", "b"}, {"c"})
        await again.publish("output", BATCH.input_file_id)
        async with again.input() as path:
            assert path.read_bytes() == answer("a") + answer("b")


async def test_a_batch_that_is_let_go_is_anybodys_at_once(bucket: str) -> None:
    with jobs_of(bucket) as first, jobs_of(bucket) as second:
        await first.create("", BATCH)
        await (await claimed(first)).release()
        assert (await claimed(second)).batch == BATCH


async def test_a_cancel_at_another_router_is_heard_and_no_answer_is_lost(bucket: str) -> None:
    with jobs_of(bucket) as first, jobs_of(bucket) as second:
        await first.create("", BATCH)
        held = await claimed(first)
        await second.change("", BATCH.id, lambda batch: msgspec.structs.replace(batch, status="cancelling"))
        await held.append([answer("a")], [])
        assert held.stopped.is_set()
        assert held.batch.status == "cancelling"
        assert held.batch.request_counts.completed == 1
        assert (await second.get("", BATCH.id)) == held.batch


async def test_a_write_whose_answer_was_lost_counts_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs_of(bucket) as jobs:
        await jobs.create("", BATCH)
        held = await claimed(jobs)
        written = Bucket.replace

        async def twice(self: Bucket, *words: Any) -> Any:
            monkeypatch.setattr(Bucket, "replace", written)
            await written(self, *words)
            return await written(self, *words)  # as a client does that heard nothing of the first

        monkeypatch.setattr(Bucket, "replace", twice)
        await held.append([answer("a")], [])
        assert held.batch.request_counts.completed == 1
        await held.append([answer("b")], [])
        assert await held.answered() == ({"a", "b"}, set())


async def test_a_killed_routers_batch_is_finished_by_another_and_no_line_is_answered_twice(
    model: ServedModel, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectJobs, "poll_seconds", 0.02)
    names = [f"line-{n}" for n in range(6)]
    first, second = Counting(model, free=2), Counting(model, free=100)
    async with contextlib.AsyncExitStack() as stack:
        with monkeypatch.context() as killed:

            async def nothing(*_: Any) -> None:
                """As if its process were gone."""

            killed.setattr(HeldObjectJob, "release", nothing)
            async with (
                running(ScriptedEngine(first.script), model, batch_dir=bucket) as api,
                api.client() as client,
            ):
                data = content(*(line(name, "/v1/completions") for name in names))
                batch = await submitted(client, data, "/v1/completions")
                await counted(client, batch.id, 2)
        clock = Clock()
        monkeypatch.setattr(ObjectJobs.__init__, "__defaults__", (clock, 0.0))
        api = await stack.enter_async_context(running(ScriptedEngine(second.script), model, batch_dir=bucket))
        client = await stack.enter_async_context(api.client())
        assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        clock.now += CLAIM_SECONDS - 1  # whatever it has seen by now
        done = asyncio.create_task(ended(client, batch.id))
        while not done.done():
            clock.now += CLAIM_SECONDS
            await asyncio.sleep(0.02)
        batch = await done
        assert batch.request_counts.completed == 6
        assert set(await lines_of(client, batch.output_file_id)) == set(names)
    assert not set(first.answered) & set(second.asked)
    assert len(second.asked) == 4


async def test_a_record_that_cannot_be_read_hides_no_other(bucket: str) -> None:
    store, objects = store_at(bucket), Bucket(bucket)
    for key in ("jobs/everyone/batch_1.json", "jobs/readme.txt", "files/everyone/file-1.json"):
        await objects.write(key, b"nonsense")
    await store.jobs.create("", BATCH)
    await store.jobs.create("", BATCH)  # as a client does that heard nothing of the first
    assert await store.jobs.of("") == [BATCH]
    assert [each.batch for each in await store.jobs.unfinished()] == [BATCH]
    assert await store.files.of("") == []
    store.close()


@pytest.mark.parametrize("more", ["", "/", "/a", "/a/b/"])
async def test_any_prefix_is_a_place(object_server: ObjectServer, bucket: str, more: str) -> None:
    store = await open_store(bucket.removesuffix("/some/prefix") + more)
    await store.jobs.create("", BATCH)
    assert await store.jobs.get("", BATCH.id) == BATCH
    assert await store.jobs.of("") == [BATCH]
    store.close()


async def test_two_routers_share_files_and_batches_and_each_line_is_asked_once(
    model: ServedModel, bucket: str
) -> None:
    engines = [ScriptedEngine(saying(model.tokenizer.encode("ok"))) for _ in range(2)]
    names = [f"line-{n}" for n in range(12)]
    async with contextlib.AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(
                (await stack.enter_async_context(running(engine, model, batch_dir=bucket))).client()
            )
            for engine in engines
        ]
        made = [
            await submitted(one, content(*map(line, names[:6]))),
            await submitted(two, content(*map(line, names[6:]))),
        ]
        done = [await ended(client, batch.id) for client, batch in zip((two, one), made, strict=True)]
        assert [batch.status for batch in done] == ["completed"] * 2
        found = [
            await lines_of(client, batch.output_file_id) for client, batch in zip((two, one), done, strict=True)
        ]
        assert [set(each) for each in found] == [set(names[:6]), set(names[6:])]
        assert {each.id for each in (await one.batches.list()).data} == {each.id for each in made}
        listed = (await one.files.list()).data
        assert len(listed) == 4
        assert (await two.files.delete(listed[0].id)).deleted
        with pytest.raises(openai.NotFoundError):
            await one.files.retrieve(listed[0].id)
        assert len((await one.files.list()).data) == 3
    assert sum(len(engine.requests) for engine in engines) == 12


async def test_a_router_that_died_while_files_were_made_is_followed_by_one_that_finishes_them(
    model: ServedModel, bucket: str
) -> None:
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    async with running(engine, model, batch_dir=bucket) as api, api.client() as client:
        batch = await ended(client, (await submitted(client, content(line("a")))).id)
    with jobs_of(bucket) as jobs:
        record, version = await jobs.read("", batch.id)
        known = msgspec.structs.replace(record.batch, status="finalizing", completed_at=None)
        await jobs.replace(msgspec.structs.replace(record, batch=known, holder=""), version)
    async with running(engine, model, batch_dir=bucket) as api, api.client() as client:
        again = await ended(client, batch.id)
        assert again.output_file_id == batch.output_file_id
        assert set(await lines_of(client, again.output_file_id)) == {"a"}
    assert len(engine.requests) == 1


async def test_parts_grow_and_are_many(bucket: str) -> None:
    with jobs_of(bucket) as jobs:
        await jobs.create("", BATCH)
        held = await claimed(jobs)
        names = [f"{n:07}" + "x" * 400_000 for n in range(8)]
        for name in names:
            await held.append([answer(name)], [])
        record, _ = await jobs.read("", BATCH.id)
        assert len(record.output) == 3
        assert await held.answered() == (set(names), set())
        await held.publish("output", BATCH.input_file_id)
        await held.publish("output", BATCH.input_file_id)
        await held.clear()
        async with held.input() as path:
            assert path.read_bytes() == b"".join(map(answer, names))
        assert await Bucket(bucket).listed("lines/") == []


async def test_what_dead_routers_left_is_removed(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvasir_engine.api.batch.objects import store as store_module

    monkeypatch.setattr(store_module, "_OLD", -store_module._OLD)  # everything is older
    store, objects = store_at(bucket), Bucket(bucket)
    written = tmp_path / "file"
    written.write_bytes(b"x")
    kept = await store.files.add("", written, "a", "batch")
    await store.jobs.create("", BATCH)
    ours = f"lines/everyone/{BATCH.id}/output-1"
    for key in ("files/everyone/file-1.data", "lines/everyone/batch_1/output-1", "probe/1", ours):
        await objects.write(key, b"x")
    await store.tidy()
    assert {each.key for each in await objects.listed("")} == {
        f"files/everyone/{kept.id}.data",
        f"files/everyone/{kept.id}.json",
        f"jobs/everyone/{BATCH.id}.json",
        ours,
    }
    store.close()


@pytest.mark.parametrize("id", ["../everyone/file-1", "file-1", "", "file-" + "A" * 24, f"file-{0:024x}/../x"])
async def test_an_id_is_no_path(bucket: str, id: str) -> None:
    store = store_at(bucket)
    with pytest.raises(ApiError, match="No such File"):
        await store.files.get("", id)
    with pytest.raises(ApiError, match="No batch"):
        await store.jobs.get("", id)
    store.close()


async def test_a_store_that_cannot_be_used_is_refused_at_the_start(
    object_server: ObjectServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(bucket)
    store.close()
    assert await Bucket(bucket).listed("") == []
    with pytest.raises(UserError, match=r"batch-dir s3://nothing-there/x: the bucket does not exist"):
        await open_store("s3://nothing-there/x")
    with pytest.raises(UserError, match=f"batch-dir {bucket}//x: .*empty path segment"):
        await open_store(f"{bucket}//x")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match=re.escape(f"batch-dir {bucket}: it cannot be reached")):
            await open_store(bucket)


async def test_a_store_without_conditional_writes_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def plain(self: Bucket, key: str, data: bytes, _version: Any = None) -> Any:
        await self.write(key, data)
        return (await self.read(key))[1]

    monkeypatch.setattr(Bucket, "create", plain)
    monkeypatch.setattr(Bucket, "replace", plain)
    with pytest.raises(UserError, match="has no conditional writes"):
        await check_bucket(Bucket(bucket))


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server with one answer to everything."""
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            while True:
                try:
                    taken, _ = sock.accept()
                except OSError:
                    return
                with taken:
                    taken.recv(65536)
                    taken.sendall(head + body)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        sock.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "AccessDenied", "access is denied (AccessDenied)"),
        (403, "InvalidAccessKeyId", "access is denied (InvalidAccessKeyId)"),
        (400, "ExpiredToken", "access is denied (ExpiredToken)"),
        (404, "NoSuchBucket", "the bucket does not exist"),
        (501, "NotImplemented", "it answered NotImplemented"),
    ],
)
async def test_why_a_store_refuses(
    bucket: str, monkeypatch: pytest.MonkeyPatch, status: int, code: str, reason: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    monkeypatch.setattr(bucket_module, "_RETRIES", {"max_retries": 0})
    with answering(status, body) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=re.escape(reason)):
            await open_store(bucket)


async def test_a_store_that_is_silent_is_not_waited_for_and_holds_nothing_up(
    model: ServedModel, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"no answer in 0\.05 s"):
            await Bucket(bucket, seconds=0.05).read("x")
        with pytest.raises(StoreError, match=r"no answer in 0\.05 s"):
            await Bucket(bucket, seconds=0.05).listed("x")
        async with (
            running(ScriptedEngine(saying([65])), model, batch_dir=bucket) as api,
            httpx.AsyncClient(base_url=api.url, timeout=60) as http,
        ):
            waiting = asyncio.create_task(http.get("/v1/files"))
            await asyncio.get_running_loop().sock_accept(_unblocked(silent))  # somebody waits for it
            assert (await http.get("/health")).status_code == 200
            plain = await http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
            assert plain.status_code == 200
            waiting.cancel()


def _unblocked(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def with_failures(
    model: ServedModel, bucket: str, engine: ScriptedEngine
) -> AsyncIterator[tuple[AsyncOpenAI, httpx.AsyncClient]]:
    async with (
        running(engine, model, batch_dir=bucket) as api,
        api.client() as client,
        httpx.AsyncClient(base_url=api.url, timeout=60) as http,
    ):
        yield client, http


async def test_a_store_that_fails_later_is_told_to_clients_without_its_address(
    model: ServedModel, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_failures(model, bucket, ScriptedEngine(saying([65]))) as (client, http):
        file = await client.files.create(file=("a", content(line("a"))), purpose="batch")

        async def fails(*_: Any, **__: Any) -> Any:
            raise StoreError("access is denied", "s3://secret-bucket")

        for name in ("read", "listed", "upload", "delete", "create"):
            monkeypatch.setattr(Bucket, name, fails)
        body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        for answer in (
            await http.get("/v1/files"),
            await http.get(f"/v1/files/{file.id}"),
            await http.get(f"/v1/files/{file.id}/content"),
            await http.delete(f"/v1/files/{file.id}"),
            await http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}),
            await http.get("/v1/batches"),
            await http.get(f"/v1/batches/{BATCH.id}"),
            await http.post(f"/v1/batches/{BATCH.id}/cancel"),
            await http.post("/v1/batches", json=body),
        ):
            assert answer.status_code == 503, answer.request.url
            assert answer.json()["error"]["code"] == "object_store"
            assert answer.json()["error"]["message"] == "The server's object store fails: access is denied."


async def test_a_batch_goes_on_once_its_store_works_again(
    model: ServedModel, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir_engine.api.batch.runner._AGAIN", 0.01)
    failed = asyncio.Event()
    written = Bucket.write

    async def fails(self: Bucket, key: str, data: bytes) -> None:
        if key.startswith("lines/") and not failed.is_set():
            failed.set()
            raise StoreError("it cannot be reached", "x")
        await written(self, key, data)

    monkeypatch.setattr(Bucket, "write", fails)
    slow = Counting(model, free=100)
    async with with_failures(model, bucket, ScriptedEngine(slow.script)) as (client, _):
        names = [f"line-{n}" for n in range(5)]
        batch = await submitted(
            client, content(*(line(name, "/v1/completions") for name in names)), "/v1/completions"
        )
        await counted(client, batch.id, 5)
        batch = await ended(client, batch.id)
        assert failed.is_set()
        assert batch.status == "completed"
        assert set(await lines_of(client, batch.output_file_id)) == set(names)


@pytest.mark.parametrize(
    ("lines", "code"), [((), "file_not_found"), ((LinesPart("lines/gone", 1),), "answers_not_found")]
)
async def test_a_batch_whose_objects_were_removed_fails(
    model: ServedModel, bucket: str, lines: tuple[LinesPart, ...], code: str
) -> None:
    objects, record = Bucket(bucket), StoredJob("", BATCH, output=lines)
    await objects.create(f"jobs/everyone/{BATCH.id}.json", msgspec.json.encode(record))
    async with with_failures(model, bucket, ScriptedEngine(saying([65]))) as (client, _):
        batch = await ended(client, BATCH.id)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == code


async def test_an_object_that_is_there_is_not_created_again(bucket: str) -> None:
    objects = Bucket(bucket)
    first = await objects.create("a", b"1")
    with pytest.raises(Taken):
        await objects.create("a", b"2")
    await objects.delete(["a", "never"])
    with pytest.raises(Taken):
        await objects.replace("a", b"3", first)
    with pytest.raises(FileNotFoundError):
        await objects.read("a")
