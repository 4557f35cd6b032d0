"""The load client's prompts: figures of two days compare only if these never change."""

import hashlib
import json

import pytest
from bench.load import WORKLOADS, workload

DIGESTS = {
    "single": "d807f096852e0be8",
    "unique": "5d854cd257ad640e",
    "shared": "6638e648cb412b37",
    "multiturn": "5ef4fcccc3365e00",
    "long": "3712041b64b8fbb7",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_never_change(name: str) -> None:
    turns = [talk.turns for talk in workload(name).talks]
    assert hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", WORKLOADS)
def test_another_seed_shares_no_prefix(name: str) -> None:
    def openings(seed: int) -> set[str]:
        return {" ".join(talk.turns[0].split()[:8]) for talk in workload(name, seed).talks}

    assert not openings(7) & openings(8)
