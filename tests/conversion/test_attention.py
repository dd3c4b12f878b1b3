"""Every branch against loops in float64 that share no code with the package."""

import pytest
import torch

from elfatt.conversion import Head, LayerPlan, hybrid_attention

EXACT, LINEAR = Head(), Head("linear")


def tokens(size, heads, d=4, prefix=0, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, prefix + size[0] * size[1], heads, d)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).unbind(0)


def starts(length, side):
    side = min(side, length)
    return [min(i * side, length - side) for i in range(-(-length // side))], side


def block_of(position, length, side):
    """The tokens of the block that holds a position; the last block reaches back where the side does not divide."""
    firsts, side = starts(length, side)
    first = firsts[position // side]
    return range(first, first + side)


def expected(q, k, v, size, plan, prefix=0, scale=None):
    out = torch.zeros_like(v)
    height, width = size
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    for b in range(q.shape[0]):
        for h, head in enumerate(plan.heads):
            for n in range(q.shape[1]):
                keys = list(range(q.shape[1]))
                branch = "exact" if n < prefix else head.branch
                if branch == "block":
                    row, column = divmod(n - prefix, width)
                    keys = list(range(prefix)) + [
                        prefix + r * width + c
                        for r in block_of(row, height, head.block)
                        for c in block_of(column, width, head.block)
                    ]
                if branch == "linear":
                    weights_q = (q[b, n, h] / head.temperature).exp()
                    weights_q = weights_q / weights_q.sum()
                    weights_k = (k[b, :, h] / head.temperature).exp()
                    weights_k = weights_k / weights_k.sum(0)
                    weights = weights_k @ weights_q
                else:
                    weights = (scale * (k[b, keys, h] @ q[b, n, h])).exp()
                    weights = weights / weights.sum()
                out[b, n, h] = weights @ v[b, keys, h]
                if n >= prefix and head.branch != "exact":
                    out[b, n, h] += head.shortcut * v[b, n, h]
    return out


PLANS = {
    "exact": (EXACT, EXACT),
    "linear": (LINEAR, LINEAR),
    "block": (Head("block", 2), Head("block", 2)),
    "sides": (Head("block", 2), Head("block", 3), Head("block", 9)),
    "elfatt": (LINEAR, LINEAR, Head("block", 2), Head("block", 2)),
    "mixed": (Head("block", 2), EXACT, Head("linear", temperature=2.0), Head("block", 2, shortcut=0.5), LINEAR),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_branch_is_its_formula(plan, size, prefix, scale):
    plan = LayerPlan(plan)
    q, k, v = (x.requires_grad_() for x in tokens(size, len(plan.heads), prefix=prefix))
    found = hybrid_attention(q, k, v, size, plan, prefix=prefix, scale=scale)
    wanted = expected(q, k, v, size, plan, prefix, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(found, (q, k, v), upstream)
    for gradient, correct in zip(gradients, torch.autograd.grad(wanted, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_plan_changes_no_bit(dtype):
    q, k, v = tokens((4, 6), 2, dtype=dtype)
    own = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(hybrid_attention(q, k, v, (4, 6), LayerPlan((EXACT, EXACT))), own)
    short = LayerPlan((LINEAR, LINEAR), min_tokens=25)
    assert torch.equal(hybrid_attention(q, k, v, (4, 6), short), own)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_block_as_large_as_the_map_is_exact(prefix):
    q, k, v = tokens((5, 7), 2, d=16, prefix=prefix, dtype=torch.float32)
    plan = LayerPlan((Head("block", 7), Head("block", 64)))
    wanted = hybrid_attention(q, k, v, (5, 7), LayerPlan((EXACT, EXACT)), prefix=prefix)
    torch.testing.assert_close(hybrid_attention(q, k, v, (5, 7), plan, prefix=prefix), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (4, 5)}, "24 tokens are not 0 plus a map of 4 × 5"),
        ({"prefix": 1}, "24 tokens are not 1 plus a map of 4 × 6"),
        ({"plan": LayerPlan((EXACT,))}, "the plan has 1 heads but the layer has 2"),
        ({"k": torch.zeros(2, 23, 2, 4)}, "must have one shape"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, v = tokens((4, 6), 2)
    arguments = {"q": q, "k": k, "v": v, "size": (4, 6), "plan": LayerPlan((EXACT, LINEAR))} | change
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**arguments)
