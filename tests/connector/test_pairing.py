"""Which workers' KV fits each other's, and by which field it does not."""

import msgspec
import pytest

from kvasir_engine.connector.layout import pairs
from kvasir_engine.protocol import HEADS_APART, Address, Endpoint, Fingerprint, Region

OURS = Fingerprint("m", "r", "bfloat16", HEADS_APART, 16, 4, 8, 64, "rope", 2)


def but(**fields: object) -> Fingerprint:
    return msgspec.structs.replace(OURS, **fields)


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (but(), None),
        (but(tensor_parallel=1), None),
        (but(tensor_parallel=8), None),
        (but(tensor_parallel=16), None),
        (but(tensor_parallel=3), "tensor_parallel: 2, 3 (one of them neither divides the 8 KV heads nor"),
        (but(tensor_parallel=12), "tensor_parallel: 2, 12 (one of them neither divides"),
        (but(page_size=32), None),
        (but(page_size=8), None),
        (but(page_size=48), None),
        (but(page_size=24), "page_size: 16, 24 (neither is a multiple of the other)"),
        (but(page_size=32, tensor_parallel=4), None),
        (but(model="n"), "model: 'm', 'n'"),
        (but(revision=""), "revision: 'r', ''"),
        (but(dtype="float16"), "dtype: 'bfloat16', 'float16'"),
        (but(layout="another"), f"layout: '{HEADS_APART}', 'another'"),
        (but(layers=5), "layers: 4, 5"),
        (but(kv_heads=4), "kv_heads: 8, 4"),
        (but(head_dim=128), "head_dim: 64, 128"),
        (but(positions="alibi"), "positions: 'rope', 'alibi'"),
        (but(digest="xxh3-64"), "digest: 'none', 'xxh3-64'"),
    ],
)
def test_the_field_that_does_not_fit_is_named_with_both_values(theirs: Fingerprint, why: str | None) -> None:
    found = OURS.mismatch(theirs)
    assert (found is None) == (why is None)
    assert (found or "").startswith(why or "")
    assert (theirs.mismatch(OURS) is None) == (why is None)


@pytest.mark.parametrize("change", [{"page_size": 32}, {"tensor_parallel": 4}])
def test_a_layout_whose_heads_are_not_apart_moves_between_equals_only(change: dict[str, int]) -> None:
    ours, theirs = but(layout="tokens first"), but(layout="tokens first", **change)
    assert ours.mismatch(ours) is None
    assert "(the layout tokens first moves between equal ones only)" in (ours.mismatch(theirs) or "")


def test_who_writes_to_whom() -> None:
    assert pairs(but(tensor_parallel=1), but(tensor_parallel=2)) == ((0, 0), (0, 1))
    assert pairs(but(tensor_parallel=4), but(tensor_parallel=2)) == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert pairs(but(tensor_parallel=16), but(tensor_parallel=1))[0] == (0, 0)
    assert len(pairs(but(tensor_parallel=16), but(tensor_parallel=1))) == 8, (
        "of two ranks with a head one writes it"
    )
    assert pairs(but(dtype="float16"), but(tensor_parallel=2)) == ((0, 0),), "to be refused"


def test_an_endpoint_names_all_its_ranks() -> None:
    region = Region(0, 1, 1)
    endpoint = Endpoint("a", 1, b"0", region, OURS, (Address("b", b"1", region),))
    assert [endpoint.address(rank).agent for rank in range(2)] == ["a", "b"]
    assert [endpoint.agent_of(rank) for rank in range(3)] == ["a", "b", "a-2"]
