"""schemathesis over the served document: whatever it makes of it, no answer is a 5xx and none is missing."""

import asyncio
import sys
from pathlib import Path

import httpx
from api_support import ScriptedEngine, running, saying

from kvasir_engine.api.tokenizer import ServedModel


async def test_no_5xx_and_no_hang(model: ServedModel, tmp_path: Path) -> None:
    engine = ScriptedEngine(saying([65, 66]))
    async with running(engine, model, batch_dir=tmp_path / "batches") as api:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from schemathesis.cli import schemathesis; schemathesis()",
            "run",
            f"{api.url}/openapi.json",
            "--checks=not_a_server_error",
            "--phases=examples,coverage,fuzzing",
            "--mode=all",
            "--max-examples=8",
            "--seed=1",
            "--request-timeout=60",
            "--workers=2",
            "--no-color",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        try:
            async with asyncio.timeout(420):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, output.decode()[-4000:]
        assert engine.requests  # some of it was right
        async with api.client() as client:
            await client.completions.create(model="tiny", prompt="a")
        async with httpx.AsyncClient(timeout=60) as http:
            assert (await http.get(f"{api.url}/health")).status_code == 200
