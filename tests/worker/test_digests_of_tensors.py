"""The bytes that are fetched for a digest are the page's, whatever device it is on."""

import pytest
import torch

from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.layout import Cut, Shape
from kvasir_engine.worker.rank import fetched

SHAPE = (3, 4, 2, 2, 16, 8)  # pages, layers, K and V, heads, tokens, dim


@pytest.mark.parametrize("layers", [range(4), range(1, 3)])
@pytest.mark.parametrize("cut", [None, Cut(4, 2, 1, 1, 2, 128)], ids=["pages", "a head of half pages"])
def test_fetched_pages_digest_as_pages_in_memory_do(layers: range, cut: Cut | None) -> None:
    pool = torch.randn(SHAPE).bfloat16()
    shape = Shape(SHAPE[1], SHAPE[3], SHAPE[4], SHAPE[5] * 2)
    fetching = Digester(0, SHAPE[0], shape, fetch=lambda page, some: fetched(pool, page, some))
    ours = Digester(pool.data_ptr(), SHAPE[0], shape).measured([2, 0], layers, cut)
    assert fetching.measured([2, 0], layers, cut).values == ours.values
