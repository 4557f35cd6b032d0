"""Moving bytes by the layout between two divided pools is the same as dividing the whole tensor anew."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir_engine.connector.layout import Route, Shape, block_numbers, block_tokens, pages_of, routes

LAYERS, ROW = 3, 4
POWERS = st.sampled_from([1, 2, 4, 8])
Array = np.ndarray[Any, np.dtype[np.uint8]]


def empty(shape: Shape, pages: int) -> list[Array]:
    """A pool a rank, [pages, layers, 2, heads, page_size, row]."""
    heads = len(shape.heads(0))
    return [np.zeros((pages, LAYERS, 2, heads, shape.page_size, ROW), np.uint8) for _ in range(shape.ranks)]


def divide(whole: Array, shape: Shape, pages: list[int], pool: int) -> list[Array]:
    """`whole` [layers, 2, kv_heads, tokens, row] in the pools of `shape`; zeros where there is nothing."""
    pools = empty(shape, pool)
    for rank, target in enumerate(pools):
        part = whole[:, :, shape.heads(rank).start : shape.heads(rank).stop]
        for place in range(-(-whole.shape[3] // shape.page_size)):
            tokens = part[:, :, :, place * shape.page_size : (place + 1) * shape.page_size]
            target[pages[place], :, :, :, : tokens.shape[3]] = tokens
    return pools


def move(route: Route, pools: tuple[Array, Array], offsets: tuple[Array, Array], count: Array) -> None:
    """Copy the pieces, and count how often each byte of the target was written."""
    source, target = (pool.reshape(-1) for pool in pools)
    for begin, end in zip(*offsets, strict=True):
        target[end : end + route.piece_bytes] = source[begin : begin + route.piece_bytes]
        count.reshape(-1)[end : end + route.piece_bytes] += 1


@given(
    kv_heads=POWERS,
    ranks=st.tuples(POWERS, POWERS),
    sizes=st.sampled_from([(4, 4), (2, 4), (4, 2), (2, 8), (8, 2), (4, 6)]),
    tokens=st.integers(1, 20),
    cached=st.integers(0, 9),
    layerwise=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_moving_by_the_layout_is_dividing_anew(
    kv_heads: int,
    ranks: tuple[int, int],
    sizes: tuple[int, int],
    tokens: int,
    cached: int,
    layerwise: bool,
    seed: int,
) -> None:
    writer, holder = (Shape(LAYERS, kv_heads, size, ROW, count) for size, count in zip(sizes, ranks, strict=True))
    unit = block_tokens(*sizes)
    first = min(cached * holder.page_size, tokens - 1) // holder.page_size * holder.page_size
    random = np.random.default_rng(seed)
    whole = random.integers(1, 256, (LAYERS, 2, kv_heads, -(-tokens // unit) * unit, ROW), np.uint8)
    ours, theirs = list(random.permutation(24)), list(random.permutation(24))
    sources = divide(whole, writer, ours, 24)
    targets = empty(holder, 24)
    counts = [np.zeros_like(pool) for pool in targets]

    total = -(-tokens // unit) - first // unit
    local = block_numbers(ours, writer.page_size // unit, first // unit, first // unit + total)
    remote = block_numbers(theirs, holder.page_size // unit, 0, total)
    for route in routes(writer, holder):
        for layers in [range(1), range(1, LAYERS)] if layerwise else [range(LAYERS)]:
            offsets: Any = route.offsets(local, remote, layers)
            pools = sources[route.writer], targets[route.holder]
            assert route.source.page_bytes == pools[0][0].nbytes
            assert route.target.page_bytes == pools[1][0].nbytes
            move(route, pools, offsets, counts[route.holder])

    for got, want in zip(targets, divide(whole[:, :, :, first:], holder, theirs, 24), strict=True):
        assert (got == want).all()
    for pool, count in zip(targets, counts, strict=True):
        assert ((pool > 0) == (count == 1)).all(), "a byte that came twice, or not at all"


def test_equal_shapes_move_whole_layers_and_each_rank_to_its_twin() -> None:
    shape = Shape(LAYERS, 8, 16, ROW, 4)
    found = routes(shape, shape)
    assert [(route.writer, route.holder, route.pieces) for route in found] == [(rank, rank, 1) for rank in range(4)]
    assert all(route.piece_bytes * LAYERS == shape.page_bytes for route in found)


def test_copies_of_a_head_share_the_work_of_writing_it() -> None:
    found = routes(Shape(LAYERS, 2, 16, ROW, 4), Shape(LAYERS, 2, 16, ROW, 8))
    assert sorted(route.holder for route in found) == list(range(8))
    assert sorted(route.writer for route in found) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("blocks", "a_page", "pages"), [((6, 7, 2, 3), 2, (3, 1)), ((5, 4), 1, (5, 4))])
def test_a_page_is_named_once_however_many_of_its_blocks_are(
    blocks: tuple[int, ...], a_page: int, pages: tuple[int, ...]
) -> None:
    assert pages_of(blocks, a_page) == pages
