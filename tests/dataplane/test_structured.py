"""Answers under schemas, prefill and decode apart and together, while clients leave and a decode worker dies."""

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from bench.systems import Server, colocated
from stack import Stack, metric, running
from structured_answers import Asker, Schema
from test_faults import kill, wait_for_quiet, wait_until_ready

sys.path.append(str(Path(__file__).parents[1] / "grammar"))
from schema_families import schemas

pytestmark = pytest.mark.dataplane

PERSON: dict[str, Any] = {
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
PERSONS: list[tuple[str, Schema]] = [(f"person {number}", PERSON) for number in range(4)]


def kill_a_decode_worker(stack: Stack) -> None:
    """The busiest."""
    victim = max(stack.pods("decode"), key=lambda pod: metric(pod, "kvasir_requests_running"))
    kill(victim["pid"])


def test_every_finished_answer_validates_though_clients_leave_and_a_decode_worker_dies(bfloat16: Stack) -> None:
    forced = bfloat16.metric("decode", "kvasir_forced_tokens_total")
    first = Asker(bfloat16.url, 200)
    first.ask("a person", PERSON)
    assert first.outcomes.ended == {"whole": 1}
    assert not first.outcomes.wrong
    assert bfloat16.metric("decode", "kvasir_forced_tokens_total") > forced
    asker = Asker(bfloat16.url, 40)
    families = [each for each in schemas() if each[0].endswith("-7")]  # one of each family
    asker.ask_all([*PERSONS, *families], lambda: kill_a_decode_worker(bfloat16))
    assert asker.outcomes.ended.total() == len(PERSONS) + len(families)
    assert not asker.outcomes.wrong
    wait_until_ready(bfloat16)
    wait_for_quiet(bfloat16)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_300_schemas_apart_and_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every, found = list(schemas()), {}
    with running(tmp_path, "bfloat16") as stack:
        asker = found["apart"] = Asker(stack.url, 120)
        half = len(every) // 2
        asker.ask_all(every[:half], lambda: kill_a_decode_worker(stack))
        wait_until_ready(stack)
        asker.at_piece.clear()
        asker.ask_all(every[half:], lambda: kill_a_decode_worker(stack))
        wait_until_ready(stack)
        wait_for_quiet(stack)
        forced = stack.metric("decode", "kvasir_forced_tokens_total")
    server = Server("colocated", colocated(tmp_path), tmp_path / "serve.log")
    try:
        server.wait_ready()
        asker = found["together"] = Asker(server.url, 120)
        asker.ask_all(every)
        assert httpx.get(server.url + "/health").status_code == 200
    finally:
        server.stop()
    with capsys.disabled():
        for name, asker in found.items():
            print(f"\n{name}: {dict(asker.outcomes.ended)}, wrong: {asker.outcomes.wrong}")
        print(f"forced tokens of the decode workers at the end, apart: {forced:.0f}")
    for asker in found.values():
        assert not asker.outcomes.wrong
        assert asker.outcomes.ended.total() == len(every)
        assert asker.outcomes.ended["whole"] > len(every) / 4
