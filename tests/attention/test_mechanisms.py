"""Every mechanism and every backend against float64 formulas written apart from the package (tests/references.py)."""

import copy

import pytest
import torch

import elfatt
from elfatt.ops import use_backend
from tests import references

MAPS = [(7, 7), (5, 9), (1, 1), (13, 6)]
CASES = [
    ("vanilla", {}),
    ("vanilla", {"lepe": False}),
    ("effatt", {}),
    ("effatt", {"lepe": False}),
    ("elfatt", {"block_size": 4}),
    ("elfatt", {"block_size": 1}),
    ("elfatt", {"block_size": 24}),
    ("elfatt", {"block_size": 3, "lepe": False}),
    ("elfatt", {"block_size": 3, "channel_split": 0.25}),
    ("elfatt", {"block_size": 3, "channel_split": 0}),
    ("elfatt", {"block_size": 3, "channel_split": 1}),
    ("cswin", {"stripe": 2}),
    ("cswin", {"stripe": 7}),
    ("swin", {"window_size": 3}),
    ("swin", {"window_size": 4, "shifted": True}),
    ("agent", {"agents": 2, "feat_size": (5, 9)}),
    ("flatten", {"feat_size": None}),
    ("flatten", {"feat_size": None, "lepe": True}),
]
IDS = [f"{name}-" + "-".join(f"{k}={v}" for k, v in options.items()) for name, options in CASES]


def build(name, options, size):
    """A mechanism of 16 channels with no parameter at zero, so that nothing can hide behind an initial value."""
    options = {k: size if k == "feat_size" and v is None else v for k, v in options.items()}
    module = elfatt.create_attention(name, dim=16, num_heads=4, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return module, {k: v for k, v in options.items() if k != "lepe"}


def run(module, x, grad):
    """Output, input gradient and parameter gradients."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    return [out.detach(), x.grad] + [p.grad for p in module.parameters()]


def relative(found, expected):
    """Largest error of each tensor, relative to its largest entry (at least 1)."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()
        for a, b in zip(found, expected, strict=True)
    )


def expected_of(name, module, options, x, grad):
    weights = {k: v.detach().double().requires_grad_() for k, v in module.named_parameters()}
    x = x.double().requires_grad_()
    out = getattr(references, name)(weights, x, num_heads=4, **options)
    out.backward(grad.double())
    return [out.detach(), x.grad] + [weights[k].grad for k, _ in module.named_parameters()]


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_forward_and_gradients_equal_the_formula(name, options, size):
    module, kept = build(name, options, size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *size, 16, generator=generator)
    grad = torch.randn(2, *size, 16, generator=generator)
    expected = expected_of(name, module, kept, x, grad)
    for backend in ("reference", "math", "sdpa", "auto"):
        with use_backend(backend):
            exact = run(copy.deepcopy(module).double(), x.double(), grad.double())
            single = run(copy.deepcopy(module), x, grad)
        assert relative(exact, expected) < 1e-12, backend
        assert relative(single, expected) < 1e-5, backend


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_an_empty_batch_gives_an_empty_map_and_zero_gradients(name, options):
    module, _ = build(name, options, (5, 9))
    x = torch.zeros(0, 5, 9, 16)
    for backend in ("reference", "plain", "math", "sdpa", "auto"):
        module.zero_grad()
        with use_backend(backend):
            out, dx, *gradients = run(module, x, x)
        assert out.shape == dx.shape == x.shape, backend
        assert not any(gradient.count_nonzero() for gradient in gradients), backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_low_precision_error_is_at_most_twice_pytorchs(name, options, dtype):
    """PyTorch's own error is that of the formula evaluated in the low precision."""
    size = (8, 12)
    module, _ = build(name, options, size)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(4, *size, 16, generator=generator) for _ in range(2))
    module, x, grad = module.to(dtype), x.to(dtype), grad.to(dtype)
    with use_backend("reference"):
        expected = run(copy.deepcopy(module).double(), x.double(), grad.double())
        plain = run(copy.deepcopy(module), x, grad)
    for backend in ("math", "auto"):
        with use_backend(backend):
            found = run(copy.deepcopy(module), x, grad)
        for a, b, c in zip(found, plain, expected, strict=True):
            own = (b.double() - c).norm() / c.norm().clamp(min=1e-6)
            ours = (a.double() - c).norm() / c.norm().clamp(min=1e-6)
            assert ours <= 2 * own, backend


@pytest.mark.parametrize("name", ["effatt", "elfatt", "agent", "flatten"])
def test_large_float16_activations_stay_finite(name):
    """±1e4 in q, k and v, the range in which FLatten and Swin are known to return NaN."""
    module = elfatt.create_attention(name, dim=32, num_heads=4).half()
    qkv = torch.empty(2, 14, 14, 96, dtype=torch.float16).uniform_(
        -1e4, 1e4, generator=torch.Generator().manual_seed(0)
    )
    if name == "elfatt":  # its softmax branch is not linear: only the global half carries the large values
        qkv.view(2, 14, 14, 3, 2, 16)[..., 1, :] /= 1e4
    for backend in ("math", "auto"):
        with use_backend(backend):
            assert module.attend(qkv).isfinite().all(), backend


@pytest.mark.parametrize("name", elfatt.list_attentions())
def test_state_dict_round_trip(name):
    first, second = (elfatt.create_attention(name, dim=32, num_heads=4) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, 6, 32)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", ["agent", "flatten"])
def test_position_tables_follow_the_map(name):
    """Trained on one size, run on another: the tables are resized, never refused."""
    module = elfatt.create_attention(name, dim=32, num_heads=4, feat_size=(8, 8))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    for size in ((8, 8), (5, 11), (1, 1)):
        assert module(torch.randn(1, *size, 32)).shape == (1, *size, 32)


def test_flatten_resizes_its_table_bicubically():
    module = elfatt.create_attention("flatten", dim=16, num_heads=4, feat_size=(4, 4))
    module.positional_encoding.data.normal_()
    same = elfatt.create_attention("flatten", dim=16, num_heads=4, feat_size=(6, 5))
    table = module.positional_encoding.transpose(1, 2).reshape(1, 16, 4, 4)
    resized = torch.nn.functional.interpolate(table, size=(6, 5), mode="bicubic").flatten(2).transpose(1, 2)
    weights = module.state_dict() | {"positional_encoding": resized}
    same.load_state_dict(weights)
    x = torch.randn(1, 6, 5, 16)
    torch.testing.assert_close(module(x), same(x))
