"""Moving bytes by the layout between two divided pools is the same as dividing the whole tensor anew."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir_engine.connector.layout import Route, block_numbers, block_tokens, pages_of, routes
from kvasir_engine.kv.spec import KVSpec, LayerKV

PAGES = 24
POWERS = st.sampled_from([1, 2, 4, 8])
Array = np.ndarray[Any, np.dtype[np.uint8]]
Layers = list[Array]
"""Of a whole sequence, a layer at a time: [parts, heads, tokens, row]."""


@st.composite
def layers_of(draw: st.DrawFn) -> tuple[LayerKV, ...]:
    """All alike, or each on its own: latents, small heads, other rows."""
    kinds = st.builds(LayerKV, st.integers(1, 2), POWERS, st.sampled_from([1, 3, 4]))
    return (draw(kinds),) * 3 if draw(st.booleans()) else tuple(draw(st.lists(kinds, min_size=1, max_size=4)))


def within(spec: KVSpec, pool: Array, layer: int) -> Array:
    """A view of a pool [pages, page bytes]: [pages, parts, heads, page_size, row]."""
    begin, end = spec.starts[layer : layer + 2]
    kind = spec.of_rank.layers[layer]
    return pool[:, begin:end].reshape(len(pool), kind.parts, kind.heads, spec.page_size, kind.row_bytes)


def empty(spec: KVSpec) -> list[Array]:
    """A pool a rank."""
    return [np.zeros((PAGES, spec.page_bytes), np.uint8) for _ in range(spec.ranks)]


def divide(whole: Layers, spec: KVSpec, pages: list[int]) -> list[Array]:
    """A sequence in the pools of `spec`; zeros where there is nothing."""
    pools = empty(spec)
    for rank, pool in enumerate(pools):
        for layer, values in enumerate(whole):
            heads = spec.heads(layer, rank)
            part = values[:, heads.start : heads.stop]
            for place in range(-(-values.shape[2] // spec.page_size)):
                tokens = part[:, :, place * spec.page_size : (place + 1) * spec.page_size]
                target = within(spec, pool[pages[place] : pages[place] + 1], layer)
                padded = np.zeros(target.shape[1:], np.uint8)
                padded[:, :, : tokens.shape[2]] = tokens
                begin, end = spec.starts[layer : layer + 2]
                pool[pages[place], begin:end] = padded.ravel()
    return pools


def move(route: Route, pools: tuple[Array, Array], pieces: tuple[Any, Any, Any], count: Array) -> None:
    """Copy the pieces, and count how often each byte of the target was written."""
    source, target = (pool.reshape(-1) for pool in pools)
    for begin, end, size in zip(*pieces, strict=True):
        target[end : end + size] = source[begin : begin + size]
        count.reshape(-1)[end : end + size] += 1


@given(
    layers=layers_of(),
    ranks=st.tuples(POWERS, POWERS),
    sizes=st.sampled_from([(4, 4), (2, 4), (4, 2), (2, 8), (8, 2), (4, 6)]),
    tokens=st.integers(1, 20),
    cached=st.integers(0, 9),
    layerwise=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_moving_by_the_layout_is_dividing_anew(
    layers: tuple[LayerKV, ...],
    ranks: tuple[int, int],
    sizes: tuple[int, int],
    tokens: int,
    cached: int,
    layerwise: bool,
    seed: int,
) -> None:
    writer, holder = (KVSpec(layers, size, count) for size, count in zip(sizes, ranks, strict=True))
    unit = block_tokens(*sizes)
    first = min(cached * holder.page_size, tokens - 1) // holder.page_size * holder.page_size
    random = np.random.default_rng(seed)
    length = -(-tokens // unit) * unit
    whole = [random.integers(1, 256, (each.parts, each.heads, length, each.row_bytes), np.uint8) for each in layers]
    ours, theirs = list(random.permutation(PAGES)), list(random.permutation(PAGES))
    sources = divide(whole, writer, ours)
    targets = empty(holder)
    counts = [np.zeros_like(pool) for pool in targets]

    total = length // unit - first // unit
    local = block_numbers(ours, writer.page_size // unit, first // unit, first // unit + total)
    remote = block_numbers(theirs, holder.page_size // unit, 0, total)
    every = range(len(layers))
    for route in routes(writer, holder):
        moved = 0
        for some in [every[:1], every[1:]] if layerwise and len(layers) > 1 else [every]:
            pieces = route.pieces(local, remote, some)
            assert route.source.moved_bytes(some) * len(local) == pieces[2].sum()
            assert route.source.page_bytes == writer.page_bytes
            assert route.target.page_bytes == holder.page_bytes
            move(route, (sources[route.writer], targets[route.holder]), pieces, counts[route.holder])
            moved += int(pieces[2].sum())
        assert moved > 0, "a route that carries nothing"

    for got, want in zip(targets, divide([each[:, :, first:] for each in whole], holder, theirs), strict=True):
        assert (got == want).all()
    for pool, count in zip(targets, counts, strict=True):
        assert ((pool > 0) == (count == 1)).all(), "a byte that came twice, or not at all"


def test_equal_shapes_move_whole_layers_and_each_rank_to_its_twin() -> None:
    spec = KVSpec((LayerKV(2, 8, 4), LayerKV(1, 1, 9), LayerKV(2, 4, 2)), 16, 4)
    found = routes(spec, spec)
    assert [(route.writer, route.holder) for route in found] == [(rank, rank) for rank in range(4)]
    # of the one latent that all ranks hold, each rank of the holder takes another rank's
    assert all(route.whole for route in found)
    assert all(route.source.moved_bytes(range(3)) == spec.page_bytes for route in found)


def test_copies_of_a_head_share_the_work_of_writing_it() -> None:
    found = routes(KVSpec.uniform(3, 2, 16, 4, 4), KVSpec.uniform(3, 2, 16, 4, 8))
    assert sorted(route.holder for route in found) == list(range(8))
    assert sorted(route.writer for route in found) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("blocks", "a_page", "pages"), [((6, 7, 2, 3), 2, (3, 1)), ((5, 4), 1, (5, 4))])
def test_a_page_is_named_once_however_many_of_its_blocks_are(
    blocks: tuple[int, ...], a_page: int, pages: tuple[int, ...]
) -> None:
    assert pages_of(blocks, a_page) == pages
