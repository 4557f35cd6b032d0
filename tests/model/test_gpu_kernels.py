"""The GPU's fused kernels in Triton's interpreter, beside the plain layers that they stand for.

Triton takes the interpreter at import, so each test runs in a process of its own.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import in_interpreter

from kvasir_engine.model.config import Rope
from kvasir_engine.model.layers.basic import Head, HeadNorm, RMSNorm, Rotary
from kvasir_engine.model.layers.mlp import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def without_cpu_kernels() -> None:
    from kvasir_engine.model.layers import cpu

    cpu.takes = lambda _: False  # type: ignore[assignment]


def masks() -> None:
    from kvasir_engine.sampling.mask_triton import masked
    from kvasir_engine.sampling.token_masks import penalties

    for vocab in (31, 32, 151, 1024, 3001):
        generator = torch.Generator().manual_seed(vocab)
        wide = torch.randn(6, vocab + 5, generator=generator)
        wide[2, 3], wide[4, 1], wide[4, 2] = float("nan"), float("inf"), -0.0
        words = torch.randint(-(2**31), 2**31, (4, -(-vocab // 32)), generator=generator).int()
        words[0], words[1] = -1, 0
        for rows in ([], [0], [5, 2, 4, 0], [1, 3, 4]):
            own = words[: len(rows)].contiguous()
            for logits in (wide[:, :vocab], wide[:, :vocab].contiguous()):
                right = logits.clone()
                if rows:
                    right[rows] += penalties(own, vocab)
                ours = masked(logits, own, rows)
                torch.testing.assert_close(ours, right, rtol=0, atol=0, equal_nan=True)


def norms() -> None:
    from kvasir_engine.gpu_kernels.residual_norm import add_norm

    without_cpu_kernels()
    for hidden in (48, 128, 576, 1500):
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(hidden)
            x = torch.randn(5, hidden, generator=generator) * 3
            part = torch.randn(5, hidden, generator=generator).to(dtype)
            weights = [torch.randn(hidden, generator=generator).to(dtype) for _ in range(2)]
            norm, after = RMSNorm(weights[0], 1e-5, offset=1.0), RMSNorm(weights[1], 1e-6, torch.float32)
            tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
            for added, first in ((None, None), (part, None), (part, after)):
                right = x.clone()
                if added is not None:
                    right += added if first is None else first(added.float())
                ours = x.clone()
                weight_eps = None if first is None else (first.weight, first.eps)
                normed = add_norm(ours, added, weight_eps, norm.weight, norm.eps, norm.dtype)
                if first is None:
                    assert torch.equal(ours, right), "a sum of two floats is the same anywhere"
                torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
                assert normed.dtype == dtype
                torch.testing.assert_close(normed, norm(right), **tolerance)
                if added is not None:
                    one = x[2:3].clone()
                    alone = add_norm(one, added[2:3], weight_eps, norm.weight, norm.eps, norm.dtype)
                    assert torch.equal(alone, normed[2:3]), "a row depends on the others"
    nothing = add_norm(torch.empty(0, 48), None, None, torch.ones(48), 1e-5, torch.bfloat16)
    assert nothing.shape == (0, 48)


def gates() -> None:
    from kvasir_engine.gpu_kernels.gate import gated

    without_cpu_kernels()
    for columns in (1, 96, 1536, 2050):
        for dtype in DTYPES:
            gate_up = torch.randn(4, 2 * columns, generator=torch.Generator().manual_seed(columns)).to(dtype) * 4
            for activation in ACTIVATIONS.values():
                ours, right = gated(gate_up, activation.name), activation(gate_up)
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(ours, right, rtol=max(2 * eps, 2e-5), atol=2e-5)
                assert torch.equal(gated(gate_up[1:2], activation.name), ours[1:2])
    extreme = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 3e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    for name in ("silu", "gelu_tanh"):
        torch.testing.assert_close(gated(extreme, name), ACTIVATIONS[name](extreme))
    assert gated(torch.empty(0, 8), "silu").shape == (0, 4)


def rotary() -> None:
    from kvasir_engine.gpu_kernels.rotary_store import rotary_store

    without_cpu_kernels()
    for heads, kv_heads, dim, page in ((6, 2, 16, 4), (9, 3, 64, 16), (4, 4, 96, 2), (1, 1, 2, 1)):
        for dtype in DTYPES:
            for normed in (False, True):
                generator = torch.Generator().manual_seed(heads)
                tokens, every = 5, heads + 2 * kv_heads
                qkv = torch.randn(tokens, every, dim, generator=generator).to(dtype)
                table = Rotary(Rope(10000.0), dim, 64, dtype, torch.device("cpu"))
                positions = torch.tensor([0, 63, 7, 8, 31])
                q_norm, k_norm = (torch.randn(dim, generator=generator).to(dtype) for _ in range(2))
                norm = HeadNorm(q_norm, k_norm, heads, kv_heads, 1e-6, 1.0) if normed else None
                # two layers of pages; the second's rows begin within the page
                pool = torch.zeros(4, 2, 2, kv_heads, page, dim, dtype=dtype)
                rows = pool.view(-1, dim)[2 * kv_heads * page :]
                slots = torch.tensor([3, 0, 2, 1, 3])
                first = slots // page * (2 * 2 * kv_heads * page) + slots % page
                right, right_pool = qkv.clone(), pool.clone()
                if norm is not None:
                    norm(right)
                table.rotate(right[:, : heads + kv_heads], table.at(positions))
                places = (first[:, None] + torch.arange(2 * kv_heads) * page).flatten()
                target = right_pool.view(-1, dim)[2 * kv_heads * page :]
                target.index_copy_(0, places[: -2 * kv_heads], right[:-1, heads:].reshape(-1, dim))
                before = qkv.clone()
                weights = None if norm is None else (norm.weight, norm.eps)
                q = rotary_store(
                    qkv[:-1], positions[:-1], (table.cos, table.sin), weights, first[:-1], rows, heads, page
                )
                assert torch.equal(qkv, before), "the product was changed"
                # The exact result of the same inputs, and how large what is added and subtracted in it is.
                exact = qkv[:-1, : heads + kv_heads].double()
                if norm is not None:
                    exact = F.rms_norm(exact, (dim,), None, norm.eps) * norm.weight
                cos, sin = (each.double() for each in table.at(positions[:-1]))
                exact = exact * cos + exact.roll(dim // 2, -1) * sin
                eps, size = (
                    torch.finfo(dtype).eps,
                    exact[..., : dim // 2].hypot(exact[..., dim // 2 :]).repeat(1, 1, 2),
                )
                turned = torch.cat(
                    (q, pool.view(-1, dim)[2 * kv_heads * page :][places[: -2 * kv_heads]].view(4, -1, dim)), 1
                )
                off = (turned[:, : heads + kv_heads] - exact).abs()
                # Triton's interpreter cuts a bfloat16 off where a GPU rounds it.
                once = (1.01 if dtype == torch.bfloat16 else 0.51) * eps
                assert bool((off <= (once + 3e-6) * size + 1e-6).all()), "more than one rounding"
                plain = torch.cat(
                    (
                        right[:-1, :heads],
                        right_pool.view(-1, dim)[2 * kv_heads * page :][places[: -2 * kv_heads]].view(4, -1, dim),
                    ),
                    1,
                )
                off = (turned - plain).abs()
                assert bool((off[:, : heads + kv_heads] <= 3 * eps * size + 1e-6).all())
                assert torch.equal(turned[:, heads + kv_heads :], qkv[:-1, heads + kv_heads :])
                left = torch.ones(len(pool.view(-1, dim)), dtype=torch.bool)
                left[places[: -2 * kv_heads] + 2 * kv_heads * page] = False
                assert not pool.view(-1, dim)[left].any(), "other rows were written"


def heads() -> None:
    from kvasir_engine.gpu_kernels.settle import settle

    for dtype, eps in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        for vocab, hidden in ((200, 64), (5000, 48), (4096, 1030)):
            torch.manual_seed(vocab)
            weight = torch.randn(vocab, hidden).to(dtype)
            weight[50:54] = weight[7] * 1.001  # next to equal
            weight[vocab - 2] = weight[7]
            weight[100:130] = weight[9]  # more than are settled
            x = torch.randn(6, hidden)
            x[1], x[2], x[3] = weight[7].float(), weight[7].float() * 1.3, weight[9].float()
            head = Head(weight)
            rounded = F.linear(x.to(dtype), weight)
            right = rounded.float()
            head.settle_queued(x, right)
            out = torch.full((6, vocab), float("nan"))
            assert settle(rounded, x, weight, out, eps, Head.QUEUED_RIVALS) is out
            torch.testing.assert_close(out, right, rtol=2e-6, atol=1e-5)
            assert torch.equal(out == rounded.float(), right == rounded.float()), "others were settled"
            assert not torch.equal(out[1:3], rounded[1:3].float())
            assert torch.equal(out[3], rounded[3].float())
            assert torch.equal(settle(rounded[1:2], x[1:2], weight, None, eps, 16), out[1:2])
            exact = x @ weight.float().T
            assert torch.equal(out[:3].argmax(-1), exact[:3].argmax(-1))


def models() -> None:
    """Whole models, their pool written by the kernels, beside the same by the plain layers."""
    import fake_flashinfer
    from sequences import Sequences, random_tokens
    from test_cuda_graphs import CPU
    from tiny_models import gemma3, llama, qwen3, runner_of

    from kvasir_engine import gpu_kernels
    from kvasir_engine.attention.base import AttentionSpec
    from kvasir_engine.attention.flashinfer_backend import FlashInferBackend
    from kvasir_engine.kv.pool import KVPool

    def runner(model: Any, folder: Path) -> Any:
        made = runner_of(model, folder)
        made.pool = KVPool(made.pool.shape, made.pool.pages, CPU)
        config = made.config
        spec = AttentionSpec(config.heads, config.attention_scale, config.windows)
        made._attention = FlashInferBackend(made.pool, spec, fake_flashinfer, 16)
        return made

    for kind in (llama, qwen3, gemma3):
        with tempfile.TemporaryDirectory() as folder:
            both = [runner(kind(), Path(folder)) for _ in range(2)]
        prompts = [random_tokens(count, both[0].vocab, seed=count) for count in (9, 20)]
        sides = [Sequences(each, prompts, 24) for each in both]
        for counts in ({0: 5, 1: 1}, {1: 9, 0: 1}, {0: 1, 1: 1}):
            logits = []
            for side, fused in zip(sides, (False, True), strict=True):
                gpu_kernels.takes = lambda _, fused=fused: fused  # type: ignore[assignment]
                logits.append(side.step(counts))
            assert not torch.equal(*logits), "the kernels did not run"
            torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(both[0].pool.tensor, both[1].pool.tensor, rtol=1e-3, atol=1e-4)
        assert both[1].pool.tensor.any()


@pytest.mark.parametrize("test", ["norms", "gates", "rotary", "heads", "models", "masks"])
def test_kernels_give_what_the_plain_layers_do(test: str) -> None:
    in_interpreter(f"test_gpu_kernels.{test}")
