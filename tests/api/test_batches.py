"""/v1/files and /v1/batches, as the official client sees them, and through restarts."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_support import Api, ScriptedEngine, failing, running, saying
from openai import AsyncOpenAI

from kvasir_engine.api.auth import ApiKeys, tenant_salt
from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits
from kvasir_engine.api.batch.runner import BEHIND
from kvasir_engine.api.batch.service import batches_of
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError, GenerateRequest, Output
from kvasir_engine.errors import UserError

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    plain = {"model": "tiny", "messages": [{"role": "user", "content": custom_id}], "max_tokens": 5}
    if url == "/v1/completions":
        plain = {"model": "tiny", "prompt": custom_id, "max_tokens": 5}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": plain | body}


def content(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


async def submitted(client: AsyncOpenAI, data: bytes, endpoint: str = CHAT, **more: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        **more,
    )


async def ended(client: AsyncOpenAI, id: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            batch = await client.batches.retrieve(id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def asked(engine: ScriptedEngine, model: ServedModel, **more: Any) -> AsyncIterator[AsyncOpenAI]:
    async with running(engine, model, **more) as api, api.client() as client:
        yield client


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    found = [json.loads(each) for each in text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


async def test_a_batch_is_answered_line_by_line(model: ServedModel, place: Path | str) -> None:
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    data = content(line("a"), line("b"), line("bad", temperature=9))
    data += content(line("urgent", priority=-1), line("s", stream=True))
    async with running(engine, model, batch_dir=place) as api, api.client() as client:
        batch = await submitted(client, data, metadata={"k": "v"})
        assert batch.status == "validating"
        batch = await ended(client, batch.id)
        assert (batch.status, batch.metadata) == ("completed", {"k": "v"})
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5, 2, 3)
        good, bad = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
        shown = await client.files.list(purpose="batch_output")
        async with httpx.AsyncClient(timeout=60) as http:
            metrics = (await http.get(f"{api.url}/metrics")).text
    assert set(good) == {"a", "b"}
    assert good["a"]["response"]["status_code"] == 200
    assert good["a"]["response"]["body"]["choices"][0]["message"]["content"] == "ok"
    assert {key: each["response"]["body"]["error"]["param"] for key, each in bad.items()} == {
        "bad": "temperature",
        "urgent": "priority",
        "s": "stream",
    }
    assert {file.id for file in shown.data} == {batch.output_file_id, batch.error_file_id}
    assert {request.priority for request in engine.requests} == {BEHIND}
    assert "kvasir_request_ttft_seconds_count 0.0" in metrics
    assert "kvasir_requests_total{" not in metrics


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/responses"])
async def test_other_endpoints(model: ServedModel, place: Path | str, url: str) -> None:
    body = line("x", url)
    if url == "/v1/responses":
        body["body"] = {"model": "tiny", "input": "x"}
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    async with running(engine, model, batch_dir=place) as api, api.client() as client:
        batch = await ended(client, (await submitted(client, content(body), url)).id)
        assert batch.request_counts.completed == 1


class Counting:
    """Answers each prompt once `gate` lets it, and counts who asked."""

    def __init__(self, model: ServedModel, free: int) -> None:
        self._model = model
        self.free = free
        self.asked: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self.more = asyncio.Condition()

    async def script(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        text = self._model.tokenizer.decode(request.tokens)
        self.asked[text] = self.asked.get(text, 0) + 1
        async with self.more:
            self.more.notify_all()
            await self.more.wait_for(lambda: self.free > 0)
            self.free -= 1
        self.answered[text] = self.answered.get(text, 0) + 1
        yield Output([65], None, "length", 0)


async def counted(client: AsyncOpenAI, id: str, completed: int) -> None:
    async with asyncio.timeout(60):
        while (await client.batches.retrieve(id)).request_counts.completed < completed:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_restart_midway_answers_each_request_once(model: ServedModel, place: Path | str) -> None:
    names = [f"line-{n}" for n in range(20)]
    data = content(*(line(name, "/v1/completions") for name in names))
    first = Counting(model, free=7)
    limits = BatchLimits(concurrency=4)
    async with asked(ScriptedEngine(first.script), model, batch_dir=place, limits=limits) as client:
        batch = await submitted(client, data, "/v1/completions")
        await counted(client, batch.id, 7)
    if isinstance(place, Path):
        (output,) = (place / "batches").glob("*.output")
        with output.open("ab") as file:
            file.write(b'{"custom_id":"line-19","id":"x","resp')  # what a crash leaves of a line
    second = Counting(model, free=100)
    async with asked(ScriptedEngine(second.script), model, batch_dir=place, limits=limits) as client:
        batch = await ended(client, batch.id)
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.total) == (20, 20)
        assert set(await lines_of(client, batch.output_file_id)) == set(names)
    assert sum(first.answered.values()) == 7
    assert sum(second.answered.values()) == 13
    assert not set(first.answered) & set(second.asked)


async def test_a_restart_while_files_are_made_finishes_them(model: ServedModel, tmp_path: Path) -> None:
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    async with running(engine, model, batch_dir=tmp_path) as api, api.client() as client:
        batch = await ended(client, (await submitted(client, content(line("a")))).id)
    state = tmp_path / "batches" / f"{batch.id}.json"
    known = json.loads(state.read_bytes())
    known["batch"] |= {"status": "finalizing", "completed_at": None}
    state.write_text(json.dumps(known))
    (tmp_path / "files" / f"{batch.output_file_id}.json").unlink()
    data = tmp_path / "files" / f"{batch.output_file_id}.data"
    data.rename(tmp_path / "batches" / f"{batch.id}.output")
    async with running(engine, model, batch_dir=tmp_path) as api, api.client() as client:
        again = await ended(client, batch.id)
        assert again.output_file_id == batch.output_file_id
        assert set(await lines_of(client, again.output_file_id)) == {"a"}
    assert len(engine.requests) == 1


async def test_a_cancelled_batch_keeps_what_was_answered(model: ServedModel, place: Path | str) -> None:
    slow = Counting(model, free=2)
    engine = ScriptedEngine(slow.script)
    data = content(*(line(f"line-{n}", "/v1/completions") for n in range(6)))
    async with asked(engine, model, batch_dir=place, limits=BatchLimits(concurrency=3)) as client:
        batch = await submitted(client, data, "/v1/completions")
        await counted(client, batch.id, 2)
        assert (await client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        batch = await ended(client, batch.id)
        assert batch.status == "cancelled"
        good, bad = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
        with pytest.raises(openai.BadRequestError):
            await client.batches.cancel(batch.id)
    assert (len(good), len(bad)) == (2, 4)
    assert {each["error"]["code"] for each in bad.values()} == {"batch_cancelled"}


async def test_a_batch_that_takes_too_long_expires(model: ServedModel, place: Path | str) -> None:
    engine = ScriptedEngine(Counting(model, free=0).script)
    async with asked(engine, model, batch_dir=place, limits=BatchLimits(seconds=1)) as client:
        batch = await ended(client, (await submitted(client, content(line("a")))).id)
        assert batch.status == "expired"
        assert (await lines_of(client, batch.error_file_id))["a"]["error"]["code"] == "batch_expired"


async def test_what_finds_no_room_is_asked_again(model: ServedModel, place: Path | str) -> None:
    full = failing([], EngineError("overloaded", "no room", 503))
    good = saying(model.tokenizer.encode("ok"))
    tries = 0

    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        nonlocal tries
        tries += 1
        async with contextlib.aclosing((full if tries < 4 else good)(request)) as outputs:
            async for output in outputs:
                yield output

    async with running(ScriptedEngine(script), model, batch_dir=place) as api, api.client() as client:
        batch = await ended(client, (await submitted(client, content(line("a")))).id)
        assert (batch.request_counts.completed, tries) == (1, 4)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"{}\n", "invalid_json_line"),
        (b"nonsense\n", "invalid_json_line"),
        (b"\xff\xfe\n", "invalid_json_line"),
        (content(line("a"), line("a")), "duplicate_custom_id"),
        (content(line("a", "/v1/completions")), "mismatched_url"),
        (content({**line("a"), "body": [1]}), "invalid_request"),
        (content({**line("a"), "method": "GET"}), "invalid_json_line"),
        (content({**line("a"), "more": 1}), "invalid_json_line"),
        (content({**line("a"), "custom_id": ""}), "invalid_json_line"),
        (content(*(line(f"{n}") for n in range(9))), "too_many_requests"),
        (content(line("a", user="x" * 6_000_000)), "request_too_large"),
    ],
)
async def test_a_bad_input_file_fails_the_batch(
    model: ServedModel, place: Path | str, data: bytes, code: str
) -> None:
    engine = ScriptedEngine(saying([1]))
    async with asked(engine, model, batch_dir=place, limits=BatchLimits(lines=8)) as client:
        batch = await ended(client, (await submitted(client, data)).id)
        assert batch.status == "failed"
        assert batch.errors.data[0].code == code
        assert batch.output_file_id is None
    assert engine.requests == []


async def test_tenants_see_only_their_own(model: ServedModel, tmp_path: Path, place: Path | str) -> None:
    (tmp_path / "keys").write_text("secret-1\nsecret-2\n")
    keys = ApiKeys(tmp_path / "keys")
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    async with running(engine, model, keys, place) as api:
        mine, other = api.client("secret-1"), api.client("secret-2")
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(mine)
            await stack.enter_async_context(other)
            batch = await ended(mine, (await submitted(mine, content(line("a")))).id)
            for call in (
                other.batches.retrieve(batch.id),
                other.batches.cancel(batch.id),
                other.files.retrieve(batch.input_file_id),
                other.files.content(batch.output_file_id),
                other.files.delete(batch.output_file_id),
                other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),  # type: ignore[arg-type]
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
            assert (await other.batches.list()).data == []
            assert (await other.files.list()).data == []
            assert [each.id for each in (await mine.batches.list()).data] == [batch.id]
            assert len((await mine.files.list()).data) == 2
            async with httpx.AsyncClient(timeout=60) as http:
                for path in ("files", "batches", f"batches/{batch.id}", f"files/{batch.input_file_id}/content"):
                    assert (await http.get(f"{api.url}/v1/{path}")).status_code == 401
                assert (await http.post(f"{api.url}/v1/files")).status_code == 401
    assert {request.salt for request in engine.requests} == {tenant_salt("secret-1")}


async def upload(api: Api, **form: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=60) as http:
        return await http.post(f"{api.url}/v1/files", **form)


async def test_files_have_limits_and_forms_are_read_strictly(model: ServedModel, place: Path | str) -> None:
    limits = BatchLimits(file_bytes=1000, files=2)
    file = {"file": ("a.jsonl", b"x" * 1000)}
    async with running(ScriptedEngine(saying([1])), model, batch_dir=place, limits=limits) as api:
        refused: list[tuple[dict[str, Any], int, str | None]] = [
            ({"files": {"file": ("a", b"x" * 1001)}, "data": {"purpose": "batch"}}, 413, "file"),
            ({"files": file, "data": {"purpose": "fine-tune"}}, 400, "purpose"),
            ({"files": file}, 400, "purpose"),
            ({"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}}, 400, None),
            ({"files": file, "data": {"purpose": "batch", "more": "1"}}, 400, "more"),
            ({"files": file, "data": {"purpose": "x" * 1001}}, 400, "purpose"),
            ({"json": {}}, 400, None),
            ({"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, None),
            ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, None),
        ]
        for form, status, param in refused:
            answer = await upload(api, **form)
            assert answer.status_code == status, answer.text
            if param is not None:
                assert answer.json()["error"]["param"] == param
        for _ in range(2):
            assert (await upload(api, files=file, data={"purpose": "batch"})).status_code == 200
        assert (await upload(api, files=file, data={"purpose": "batch"})).status_code == 400
        async with api.client() as client:
            (one, two) = (await client.files.list()).data
            assert (one.filename, one.bytes, one.purpose, one.status) == ("a.jsonl", 1000, "batch", "processed")
            assert (await client.files.content(one.id)).content == b"x" * 1000
            assert (await client.files.delete(one.id)).deleted
            assert [each.id for each in (await client.files.list()).data] == [two.id]
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(one.id)
    if isinstance(place, Path):
        assert not [path for path in (place / "files").iterdir() if path.name.startswith(".")]


async def test_the_input_of_a_running_batch_stays(model: ServedModel, place: Path | str) -> None:
    engine = ScriptedEngine(Counting(model, free=0).script)
    async with running(engine, model, batch_dir=place) as api, api.client() as client:
        batch = await submitted(client, content(line("a")))
        with pytest.raises(openai.BadRequestError, match=batch.id):
            await client.files.delete(batch.input_file_id)


async def test_pages_of_lists(model: ServedModel, place: Path | str) -> None:
    async with running(ScriptedEngine(saying([1])), model, batch_dir=place) as api, api.client() as client:
        made = [(await submitted(client, content(line("a")))).id for _ in range(3)]
        listed = [batch.id async for batch in await client.batches.list(limit=2)]
        assert sorted(listed) == sorted(made)
        async with httpx.AsyncClient(base_url=api.url, timeout=60) as http:
            for query in ("limit=0", "limit=x", "limit=101", "after=nothing", "more=1"):
                assert (await http.get(f"/v1/batches?{query}")).status_code == 400
            assert (await http.get("/v1/files?order=up")).status_code == 400


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "x" * 1001}}, "metadata"),
        ({"nonsense": 1}, "nonsense"),
        ({"input_file_id": "file-none"}, "id"),
    ],
)
async def test_bad_batches_are_refused(
    model: ServedModel, place: Path | str, more: dict[str, Any], param: str
) -> None:
    async with running(ScriptedEngine(saying([1])), model, batch_dir=place) as api, api.client() as client:
        file = await client.files.create(file=("in", b"{}"), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | more
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.post(f"{api.url}/v1/batches", json=body)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param


async def test_without_a_folder_they_are_refused(model: ServedModel) -> None:
    async with (
        running(ScriptedEngine(saying([1])), model) as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as http,
    ):
        for path in ("/v1/files", "/v1/batches", "/v1/batches/x"):
            assert "--batch-dir" in (await http.post(path)).json()["error"]["message"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    first = BatchFolder(tmp_path)
    with pytest.raises(UserError, match="another process uses it"):
        BatchFolder(tmp_path)
    first.close()
    BatchFolder(tmp_path).close()
    with pytest.raises(UserError, match="batch-dir"):
        BatchFolder(Path("/proc/nothing"))


@pytest.mark.parametrize(
    "where", ["file:///tmp/batches", "http://host/bucket", "s3://", "s3:///x", "s3://a?b=c", "gs://a b"]
)
async def test_an_address_of_no_object_store_is_refused_and_no_folder_is_made_of_its_name(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"batch-dir {where}: it has to be ")):
        await batches_of(where, Lifecycle())
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
