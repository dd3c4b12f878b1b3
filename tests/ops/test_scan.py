"""The selective scan against its recurrence in plain numbers, and what mamba_ssm's kernel is handed."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from elfatt import ops
from elfatt.ops import recurrence as scan

LENGTHS = (1, scan.CHUNK - 1, scan.CHUNK, scan.CHUNK + 1, 3 * scan.CHUNK**2 + 5)  # the last one in three levels
NAMES = ("x", "delta", "a", "b", "c", "d")


def arguments(length=7, batch=2, groups=2, channels=3, states=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = (batch, groups, length)
    return [
        draw(*tokens, channels),
        F.softplus(draw(*tokens, channels)),
        -draw(groups, channels, states).exp(),
        draw(*tokens, states),
        draw(*tokens, states),
        draw(groups, channels),
    ]


def loop(x, delta, a, b, c, d):
    """By its definition, in plain numbers."""
    x, delta, a, b, c, d = (t.tolist() for t in (x, delta, a, b, c, d))
    out = torch.zeros(len(x), len(d), len(x[0][0]), len(d[0]), dtype=torch.float64)
    for i, k, j in torch.cartesian_prod(*(torch.arange(n) for n in (len(x), len(d), len(d[0])))).tolist():
        state = [0.0] * len(a[k][j])
        for t in range(out.shape[2]):
            step = delta[i][k][t][j]
            for n in range(len(state)):
                state[n] = math.exp(step * a[k][j][n]) * state[n] + step * b[i][k][t][n] * x[i][k][t][j]
            out[i, k, t, j] = sum(p * q for p, q in zip(c[i][k][t], state, strict=True)) + d[k][j] * x[i][k][t][j]
    return out


def outputs(tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = ops.selective_scan(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)]


@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_equals_the_loop(length, states):
    tensors = arguments(length, states=states)
    expected = loop(*tensors)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            assert (ops.selective_scan(*tensors) - expected).abs().max() < 1e-12 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_equal_those_of_the_loop(length):
    """Autograd runs back through ``reference``, which is the loop over the tokens."""
    tensors = arguments(length)
    with ops.use_backend("reference"):
        expected = outputs(tensors)
    for a, b in zip(outputs(tensors), expected, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max().clamp(min=1)


def test_gradients_by_finite_differences():
    tensors = [t.requires_grad_() for t in arguments(scan.CHUNK + 3, batch=1)]
    assert torch.autograd.gradcheck(ops.selective_scan, tensors)


@pytest.mark.parametrize("length", [50, 5000])
def test_float32_stays_close_over_long_sequences(length):
    tensors = arguments(length, batch=1)
    for a, b in zip(outputs([t.float() for t in tensors]), outputs(tensors), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_in_float32(dtype):
    tensors = arguments(dtype=dtype)
    found = ops.selective_scan(*tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.selective_scan(*(t.float() for t in tensors)))


def test_decays_that_underflow_leave_finite_gradients():
    tensors = arguments(100)
    tensors[1] = tensors[1] * 1e4
    assert all(t.isfinite().all() for t in outputs([t.float() for t in tensors]))


def test_strides_do_not_matter():
    tensors = arguments(40)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    torch.testing.assert_close(ops.selective_scan(*strided), ops.selective_scan(*tensors))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x", r"x must be \[B, K, L, D\], got \(7, 3\)"),
        ("delta", r"delta must be \[2, 2, 7, 3\] for x \[2, 2, 7, 3\], got \[7, 3\]"),
        ("b", r"b must be \[2, 2, 7, 2\].* got \[7, 2\]"),
        ("d", r"d must be \[2, 3\].* got \[\]"),
    ],
)
def test_bad_shapes_are_named(name, words):
    tensors = arguments()
    i = NAMES.index(name)
    tensors[i] = tensors[i][0, 0]
    with pytest.raises(ValueError, match=words):
        ops.selective_scan(*tensors)


def mamba_kernel(u, delta, A, B, C, D):
    """What mamba_ssm documents of ``selective_scan_fn``: u and delta (b d l), A (d n), B and C (b g n l), D (d)."""
    groups = B.shape[1]
    assert all(t.is_contiguous() for t in (u, delta, A, B, C)) and u.shape[1] == A.shape[0] == D.shape[0]
    state, out = 0, []
    B, C = (t.repeat_interleave(u.shape[1] // groups, 1) for t in (B, C))
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = (step * A).exp() * state + step * B[..., t] * u[:, :, t, None]
        out.append((state * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(out, -1)


def test_the_kernel_is_handed_its_layout():
    tensors = arguments(9)
    torch.testing.assert_close(scan._run_kernel(mamba_kernel, *tensors), ops.selective_scan(*tensors))


def test_the_kernel_is_found_where_it_is_installed(monkeypatch):
    assert scan._kernel() is None
    package, module = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.__spec__ = SimpleNamespace()
    module.selective_scan_fn = mamba_kernel
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    for name, part in zip(names, (package, package, module), strict=True):
        monkeypatch.setitem(sys.modules, name, part)
    package.__path__ = []
    scan._kernel.cache_clear()
    try:
        assert scan._kernel() is mamba_kernel
    finally:
        scan._kernel.cache_clear()
