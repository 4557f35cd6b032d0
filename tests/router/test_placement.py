"""Placement as a table: who takes a prompt of 1,000 tokens."""

import dataclasses

import msgspec
import pytest
from fake_worker import fingerprint

from kvasir_engine.router.placement import Candidate, place, readable


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


PAGE = fingerprint("bfloat16").page_size
READS = [  # what prefill has, what decode has, prefill tokens/s, read bytes/s -> from where prefill reads
    ("decode has more", 0, 640, 1000.0, 1e9, 0),
    ("and prefill a beginning", 320, 640, 1000.0, 1e9, 320),
    ("prefill has as much", 640, 640, 1000.0, 1e9, None),
    ("prefill has more", 800, 640, 1000.0, 1e9, None),
    ("less than a page more", 640, 640 + PAGE - 1, 1000.0, 1e9, None),
    ("nothing was measured yet", 0, 640, 0.0, 0.0, 0),
    ("reading is slower than computing", 0, 640, 1000.0, 1e6, None),
    ("computing is fast", 0, 640, 1e6, 1e9, None),
    ("too little for what a read costs beside its bytes", 624, 640, 1e4, 1e12, None),
]


@pytest.mark.parametrize(
    ("case", "prefill", "decode", "prefill_rate", "read_rate", "lend_from"), READS, ids=[case[0] for case in READS]
)
def test_what_decode_has_is_read_where_that_is_cheaper_than_computing_it(
    case: str, prefill: int, decode: int, prefill_rate: float, read_rate: float, lend_from: int | None
) -> None:
    writer = dataclasses.replace(
        worker("p1", cached=prefill), prefill_rate=prefill_rate, read_rate=read_rate, token_bytes=10_000
    )
    placement = place(1000, [writer, worker("d1", cached=decode)], threshold=64)
    assert placement is not None
    assert placement.prefill is writer
    assert placement.lend_from == lend_from


def test_a_prefill_worker_that_can_read_is_as_good_as_one_that_has_it() -> None:
    decode = worker("d1", cached=640)
    have = worker("p1", cached=640, queued=100)
    can_read = dataclasses.replace(worker("p2"), prefill_rate=1000.0, read_rate=1e9, token_bytes=10_000)
    placement = place(1000, [have, can_read, decode], threshold=64)
    assert placement is not None
    assert (placement.prefill, placement.lend_from) == (can_read, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "have", "lent", "read"),
    [
        (32, 16, 0, 80, 64),  # the fifth page that is lent fills half of one
        (16, 32, 0, 96, 96),
        (16, 32, 16, 96, 80),
        (32, 16, 32, 63, 0),  # three pages are lent
        (32, 16, 32, 64, 32),
    ],
)
def test_what_is_read_fills_whole_pages_of_the_reader(
    ours: int, theirs: int, have: int, lent: int, read: int
) -> None:
    sizes = [
        msgspec.structs.replace(worker("p1").fingerprint, page_size=size, tensor_parallel=2)
        for size in (ours, theirs)
    ]
    reader, decode = (
        dataclasses.replace(worker(name, cached=cached), fingerprint=size)
        for name, cached, size in zip(("p1", "d1"), (have, lent), sizes, strict=True)
    )
    assert readable(reader, decode) == read
