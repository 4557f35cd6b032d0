"""The CPU kernels against float64, at every shape class they divide their work into."""

import pytest
import torch

from kvasir_engine.cpu_kernels import unavailable_reason

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

from kvasir_engine.cpu_kernels import elementwise
from kvasir_engine.cpu_kernels.attention import SEGMENT, PagedDecode
from kvasir_engine.cpu_kernels.linear import PackedWeight


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "columns"), [(16, 2), (48, 64), (112, 96), (320, 34)])
def test_products_of_any_number_of_tokens(rows: int, columns: int) -> None:
    weight, bias = torch.randn(rows, columns).bfloat16(), torch.randn(rows)
    plain, biased = PackedWeight(weight), PackedWeight(weight, bias)
    for tokens in [*range(1, 18), 67]:
        x = torch.randn(tokens, columns + 6).bfloat16()[:, :columns]  # rows that are apart
        right = x.double() @ weight.double().T
        out = plain.multiply(x, torch.full((tokens, rows), 7.0))
        torch.testing.assert_close(out.double(), right, atol=1e-4, rtol=1e-5)
        assert torch.equal(plain.multiply(x, x.new_empty(tokens, rows)), out.bfloat16())
        added = plain.multiply(x, torch.full((tokens, rows), 3.0), add=True)
        torch.testing.assert_close(added, out + 3.0)
        torch.testing.assert_close(biased.multiply(x, torch.empty(tokens, rows)), out + bias)


@pytest.mark.usefixtures("threads")
def test_a_tokens_product_has_the_same_bits_in_any_batch() -> None:
    packed, x = PackedWeight(torch.randn(176, 96).bfloat16()), torch.randn(31, 96).bfloat16()
    together = packed.multiply(x, torch.empty(31, 176))
    for start, end in [(0, 1), (30, 31), (3, 5), (8, 17), (0, 30)]:
        assert torch.equal(packed.multiply(x[start:end], torch.empty(end - start, 176)), together[start:end])


@pytest.mark.usefixtures("threads")
def test_the_largest_logits_are_settled_in_float32_and_no_others() -> None:
    weight = torch.randn(64, 32).bfloat16()
    weight[40] = weight[9]
    x = torch.stack([weight[9].float() * 1.0003, torch.randn(32), torch.zeros(32)])
    packed = PackedWeight(weight)
    rough = packed.multiply(x.bfloat16(), torch.empty(3, 64))
    logits = rough.clone()
    packed.settle(logits, x, rounding=1 / 128, most=8)
    exact = (x.double() @ weight.double().T).float()
    changed = (logits != rough).nonzero().tolist()
    assert changed == [[0, 9], [0, 40]]  # a lone largest, or 64 equal ones, stay as they are
    torch.testing.assert_close(logits[0, [9, 40]], exact[0, [9, 40]])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [0, 1, 37, SEGMENT + 44])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 16), (8, 8, 32, 32), (4, 1, 128, 64)]
)
def test_attention_over_scattered_pages(heads: int, kv_heads: int, dim: int, page_size: int, window: int) -> None:
    pool = torch.randn(120, 2, 2, kv_heads, page_size, dim).bfloat16()
    contexts = [1, 15, 16, 17, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 88]
    pages = torch.randint(0, 120, (len(contexts), -(-max(contexts) // page_size)))
    rows = [i + 1 for i in range(len(contexts))]
    q = torch.randn(len(contexts) + 2, heads + 3, dim).bfloat16()[:, :heads]
    out = torch.full((len(q), heads * dim), 7.0).bfloat16()
    kernel = PagedDecode(pool, heads, dim**-0.5)
    kernel.plan(rows, contexts, pages)
    kernel.run(1, q, out, window)
    for row, context, own in zip(rows, contexts, pages, strict=True):
        torch.testing.assert_close(
            out[row].double(), attended(pool[own, 1], q[row], context, window), atol=0.01, rtol=0.02
        )
    assert (out[[0, -1]] == 7).all(), "rows of others were written"


def attended(pages: torch.Tensor, q: torch.Tensor, context: int, window: int) -> torch.Tensor:
    """[heads * dim] in float64, from the sequence's pages [n, 2, kv_heads, page_size, dim]."""
    kv = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context].double()
    k, v = kv[:, :, max(0, context - window) if window else 0 :]
    grouped = q.double().view(len(k), -1, q.shape[-1])
    weights = (grouped @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).flatten()


@pytest.mark.usefixtures("threads")
def test_what_lies_behind_the_last_token_cannot_spoil_the_sum() -> None:
    pool = torch.full((3, 1, 2, 1, 16, 32), float("nan")).bfloat16()
    pool[1, 0, :, :, :5] = 1.0
    pool[2] = 1.0
    out = torch.empty(1, 32).bfloat16()
    kernel = PagedDecode(pool, 1, 1.0)
    kernel.plan([0], [21], torch.tensor([[2, 1]]))
    kernel.run(0, torch.ones(1, 1, 32).bfloat16(), out)
    assert (out == 1.0).all()


@pytest.mark.usefixtures("threads")
def test_a_sequence_has_the_same_bits_beside_any_other() -> None:
    pool = torch.randn(90, 1, 2, 3, 16, 64).bfloat16()
    pages, q = torch.randint(0, 90, (3, 40)), torch.randn(3, 9, 64).bfloat16()
    contexts = [300, 621, 16]
    kernel = PagedDecode(pool, 9, 0.125)
    together, alone = torch.empty(3, 576).bfloat16(), torch.empty(3, 576).bfloat16()
    kernel.plan([0, 1, 2], contexts, pages)
    kernel.run(0, q, together)
    for i, context in enumerate(contexts):
        kernel.plan([i], [context], pages[i : i + 1])
        kernel.run(0, q, alone)
    assert torch.equal(together, alone)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 300], ids=["in one thread", "divided"])
def test_norm_rotation_and_gate(rows: int) -> None:
    x, weight = torch.randn(rows, 80) * 3, torch.rand(80)
    right = torch.nn.functional.rms_norm(x, (80,), weight, 1e-5)
    norm = elementwise.Norm(weight, 1e-5)
    torch.testing.assert_close(norm(x, torch.empty(rows, 80)), right)
    narrowed = norm(x, torch.empty(rows, 80, dtype=torch.bfloat16))
    torch.testing.assert_close(narrowed, right.bfloat16())

    angles = torch.rand(rows, 1, 16)
    cos, sin = torch.cat([angles.cos()] * 2, -1).bfloat16(), torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
    qkv = torch.randn(rows, 5, 32).bfloat16()
    turned = qkv.clone()
    elementwise.rotate(turned[:, :4], cos, sin)
    right = qkv.double() * cos.double() + qkv.double().roll(16, -1) * sin.double()
    torch.testing.assert_close(turned[:, :4].double(), right[:, :4], atol=0.01, rtol=0.01)
    assert torch.equal(turned[:, 4], qkv[:, 4])

    gate_up = (torch.randn(rows, 2 * 100) * 8).bfloat16()
    gate_up[0, :4] = torch.tensor([-1000.0, 1000.0, -88.0, -0.0])
    gate, up = gate_up.double().chunk(2, -1)
    right = (torch.nn.functional.silu(gate) * up).bfloat16()
    torch.testing.assert_close(elementwise.silu_mul(gate_up), right, atol=1e-30, rtol=0.01)
    right = (torch.nn.functional.gelu(gate, approximate="tanh") * up).bfloat16()
    torch.testing.assert_close(elementwise.gelu_mul(gate_up), right, atol=1e-6, rtol=0.01)
