"""Answers under a schema, prefill and decode apart, while clients leave and a decode worker dies."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from stack import Stack, metric
from test_faults import kill, openai, wait_for_quiet, wait_until_ready

pytestmark = pytest.mark.dataplane

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 10},
        "home_address": {
            "type": "object",
            "properties": {
                "street_name": {"type": "string", "maxLength": 10},
                "house_number": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["street_name", "house_number"],
            "additionalProperties": False,
        },
        "employment_status": {"enum": ["employed", "unemployed", "retired"]},
    },
    "required": ["first_name", "home_address", "employment_status"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def answer(stack: Stack, number: int, at_piece: threading.Event | None = None, leave: bool = False) -> str:
    """The streamed text; `at_piece` is set when some of it has come."""
    parts: list[str] = []
    with openai(stack) as client:
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": f"Describe person number {number} as JSON."}],
            max_tokens=200,
            temperature=0.7,
            seed=number,
            stream=True,
            response_format=FORMAT,
        )
        for part in stream:
            parts.append(part.choices[0].delta.content or "")
            if at_piece is not None and len(parts) == 4:
                at_piece.set()
            if leave and len(parts) == 3:
                stream.close()
                break
    return "".join(parts)


def test_every_finished_answer_validates_though_clients_leave_and_a_decode_worker_dies(bfloat16: Stack) -> None:
    forced = bfloat16.metric("decode", "kvasir_forced_tokens_total")
    jsonschema.validate(json.loads(answer(bfloat16, 0)), SCHEMA)
    assert bfloat16.metric("decode", "kvasir_forced_tokens_total") > forced
    decodes = bfloat16.pods("decode")
    with ThreadPoolExecutor(6) as threads:
        streaming = threading.Event()
        answers = [threads.submit(answer, bfloat16, number, streaming) for number in range(1, 5)]
        leaving = [threads.submit(answer, bfloat16, number, None, True) for number in (5, 6)]
        assert streaming.wait(120)
        victim = max(decodes, key=lambda pod: metric(pod, "kvasir_requests_running"))
        kill(victim["pid"])
        for each in answers:
            jsonschema.validate(json.loads(each.result()), SCHEMA)
        for each in leaving:
            each.result()
    wait_until_ready(bfloat16)
    wait_for_quiet(bfloat16)
