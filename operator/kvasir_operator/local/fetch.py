"""Fetches a model into the cache before pods start, in a process of its own, since conversion needs much memory.

`python -m kvasir_operator.local.fetch URI [REVISION]` writes a line of JSON for each step of progress, then one
with the model's metadata. Errors are one `kvasir: error:` line and status 2.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kvasir_operator.api.validation import ModelMetadata
from kvasir_operator.local.errors import LocalError
from kvasir_operator.pods.environment import Launch
from kvasir_operator.pods.logs import ERROR
from kvasir_operator.pods.process import Process

COMMAND = (sys.executable, "-m", "kvasir_operator.local.fetch")


async def fetch(
    command: tuple[str, ...], env: Mapping[str, str], progress: Callable[[str, int, int], None]
) -> ModelMetadata | None:
    """Run the fetching `command` and pass (stage, done, total) to `progress`. Raises LocalError with the reason."""
    output: list[str] = []
    metadata: ModelMetadata | None = None

    def line(text: str) -> None:
        nonlocal metadata
        try:
            message: Any = json.loads(text)
        except ValueError:
            message = None
        match message:
            case {"stage": str(stage), "done": int(done), "total": int(total)}:
                progress(stage, done, total)
            case {"heads": int(heads), "kv_heads": int(kv_heads), "max_positions": int(positions)}:
                metadata = ModelMetadata(heads, kv_heads, positions)
            case _:
                output.append(text)

    process = await Process.start(Launch(command, env), line)
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if code:
        errors = [text for text in output if text.startswith(ERROR)] or output[-1:]
        reason = errors[-1].removeprefix(ERROR).strip() if errors else f"exit status {code}"
        raise LocalError(f"model: {reason}", status=2 if code == 2 else 1)
    return metadata


def _say(message: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Resolve the model named on the command line into `$KVASIR_CACHE`."""
    from kvasir_engine.errors import ModelError
    from kvasir_engine.model.loading.resolver import resolve
    from kvasir_engine.model.loading.uri import ModelURIError
    from kvasir_operator.reconcile.model_metadata import metadata_of

    uri, revision = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    last: tuple[str, int] = ("", -1)

    def progress(stage: str, done: int, total: int) -> None:
        # At most a hundred lines a stage.
        nonlocal last
        step = (stage, done * 100 // total if total else -1)
        if step != last:
            last = step
            _say({"stage": stage, "done": done, "total": total})

    try:
        folder = resolve(uri, revision, progress=progress)
    except (ModelError, ModelURIError) as error:
        sys.stderr.write(f"{ERROR} {error}\n")
        return 2
    if (metadata := metadata_of(json.loads((folder / "config.json").read_text()))) is not None:
        _say(msgspec.structs.asdict(metadata))
    return 0


if __name__ == "__main__":
    sys.exit(main())
