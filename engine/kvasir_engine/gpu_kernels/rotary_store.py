"""Norms of heads, rotary positions and the store of K and V in one kernel, from the product of Q, K and V.

Unfused these are some ten kernels, of which four write Q and K. A program takes some heads of a token. Q goes to a
tensor of its own, K and V into the pool; nothing is changed in place.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl

HEADS = 8
"""Of one program."""
WARPS = 4


@triton.jit
def _rotary_store(
    qkv, positions, cos, sin, norm, rows, pool, q,
    NORM: tl.constexpr, EPS: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PADDED)
    inside = (head[:, None] < Q + 2 * KV) & (pair[None, :] < HALF)
    turned = inside & (head[:, None] < Q + KV)
    begin = head[:, None] * DIM + pair[None, :]
    source = qkv + token * (Q + 2 * KV) * DIM + begin
    raw_1 = tl.load(source, mask=inside, other=0.0)
    raw_2 = tl.load(source + HALF, mask=inside, other=0.0)
    x_1, x_2 = raw_1.to(tl.float32), raw_2.to(tl.float32)
    if NORM:
        mean = (tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / DIM
        scale = (1.0 / tl.sqrt(mean + EPS))[:, None]
        x_1 = x_1 * scale * tl.load(norm + begin, mask=turned, other=0.0)
        x_2 = x_2 * scale * tl.load(norm + begin + HALF, mask=turned, other=0.0)
    angle = tl.load(positions + token) * DIM + pair
    cos_1 = tl.load(cos + angle, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + angle + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    # Rounded once; the plain form rounds the norm and the first product too, and on CPUs the second.
    y_1 = tl.where(turned, (x_1 * cos_1 - x_2 * sin_2).to(raw_1.dtype), raw_1)
    y_2 = tl.where(turned, (x_2 * cos_1 + x_1 * sin_2).to(raw_1.dtype), raw_2)
    to_q = inside & (head[:, None] < Q)
    target = q + token * Q * DIM + begin
    tl.store(target, y_1, mask=to_q)
    tl.store(target + HALF, y_2, mask=to_q)
    # Of a page first all heads of K, then all of V; rows are those of the first.
    row = tl.load(rows + token) + (head[:, None] - Q).to(tl.int64) * PAGE
    kept = inside & (head[:, None] >= Q)
    slot = pool + row * DIM + pair[None, :]
    tl.store(slot, y_1, mask=kept)
    tl.store(slot + HALF, y_2, mask=kept)


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor, float] | None,
    rows: torch.Tensor,
    pool: torch.Tensor,
    heads: int,
    page_size: int,
) -> torch.Tensor:
    """Q [T, heads, head_dim], turned; K, turned, and V are in the pool.

    `qkv` is [T, heads + 2 * kv_heads, head_dim]; `tables` are the cosines and sines of all positions, twice over
    the half, the first half's sines negative; `norm` the weights of all heads of Q and K, float32,
    [heads + kv_heads, head_dim], and their epsilon. `pool` is rows of head_dim elements; `rows` [T] says which has
    the first head of K of a token; the next heads', K's and then V's, come `page_size` rows later each.
    """
    tokens, all_heads, dim = qkv.shape
    assert qkv.is_contiguous()
    q = qkv.new_empty(tokens, heads, dim)
    weights, eps = norm if norm is not None else (tables[0], 0.0)
    if tokens:
        _rotary_store[(tokens, triton.cdiv(all_heads, HEADS))](
            qkv, positions, *tables, weights, rows, pool, q,
            NORM=norm is not None, EPS=eps,
            **constants(heads, (all_heads - heads) // 2, dim, page_size), num_warps=WARPS,
        )  # fmt: skip
    return q


def constants(heads: int, kv_heads: int, dim: int, page_size: int) -> dict[str, int]:
    """What `_rotary_store` is compiled for of a model, as a rank holds it."""
    half = dim // 2
    return {
        "Q": heads, "KV": kv_heads, "DIM": dim, "HALF": half,
        "PADDED": triton.next_power_of_2(half), "PAGE": page_size, "HEADS": HEADS,
    }  # fmt: skip
