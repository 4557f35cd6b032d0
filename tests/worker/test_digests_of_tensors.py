"""The bytes that are fetched for a digest are the page's, whatever device it is on."""

import pytest
import torch

from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.layout import Cut
from kvasir_engine.worker.rank import fetched

SHAPE = (3, 4, 2, 2, 16, 8)  # pages, layers, K and V, heads, tokens, dim


@pytest.mark.parametrize("layers", [range(4), range(1, 3)])
@pytest.mark.parametrize("cut", [None, Cut(4, 2, 1, 1, 2, 128)], ids=["pages", "a head of half pages"])
def test_fetched_pages_digest_as_pages_in_memory_do(layers: range, cut: Cut | None) -> None:
    pool = torch.randn(SHAPE).bfloat16()
    sizes = pool.data_ptr(), SHAPE[0], pool[0].nbytes, SHAPE[1]
    fetching = Digester(0, *sizes[1:], lambda page, some: fetched(pool, page, some))
    assert fetching([2, 0], layers, cut) == Digester(*sizes)([2, 0], layers, cut)
