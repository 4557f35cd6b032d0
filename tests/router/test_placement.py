"""Placement as a table: who takes a prompt of 1,000 tokens."""

import pytest
from fake_worker import fingerprint

from kvasir_engine.router.placement import Candidate, place


def worker(name: str, *, queued: int = 0, requests: int = 0, cached: int = 0, dtype: str = "bfloat16") -> Candidate:
    role = {"p": "prefill", "d": "decode", "b": "both"}[name[0]]
    return Candidate(name, role, fingerprint(dtype), queued, requests, cached)  # type: ignore[arg-type]


TABLE = {
    "one pair": ([worker("p1"), worker("d1")], "d1", "p1"),
    "no prefill worker": ([worker("d1")], "d1", None),
    "an engine of both roles": ([worker("b1")], "b1", None),
    "nothing to decode on": ([worker("p1")], None, None),
    "nobody": ([], None, None),
    "the idle prefill worker": ([worker("p1", queued=500), worker("p2"), worker("d1")], "d1", "p2"),
    "the idle decode worker": ([worker("p1"), worker("d1", requests=3), worker("d2")], "d2", "p1"),
    "the prefill worker that has the prefix": ([worker("p1"), worker("p2", cached=900), worker("d1")], "d1", "p2"),
    "not when it is busier than the prefix is worth": (
        [worker("p1"), worker("p2", cached=900, queued=2000), worker("d1")],
        "d1",
        "p1",
    ),
    "a decode worker that has nearly all does the rest": ([worker("p1"), worker("d1", cached=990)], "d1", None),
    "just not nearly enough": ([worker("p1"), worker("d1", cached=936)], "d1", "p1"),
    "a decode worker with the prefix, before an empty one": (
        [worker("p1"), worker("d1"), worker("d2", cached=990)],
        "d2",
        None,
    ),
    "what is moved counts a little": ([worker("p1"), worker("d1"), worker("d2", cached=500)], "d2", "p1"),
    "no pairing across fingerprints": ([worker("p1", dtype="float32"), worker("d1")], "d1", None),
    "pairs within fingerprints": (
        [worker("p1", dtype="float32"), worker("d1", requests=1, dtype="float32"), worker("d2", queued=5000)],
        "d1",
        "p1",
    ),
    "of equals the first": ([worker("p2"), worker("p1"), worker("d2"), worker("d1")], "d2", "p2"),
}


@pytest.mark.parametrize(("candidates", "decode", "prefill"), TABLE.values(), ids=TABLE)
def test_placement(candidates: list[Candidate], decode: str | None, prefill: str | None) -> None:
    placement = place(1000, candidates, threshold=64)
    if decode is None:
        assert placement is None
    else:
        assert placement is not None
        assert placement.decode.name == decode
        assert (placement.prefill.name if placement.prefill else None) == prefill
