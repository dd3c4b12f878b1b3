"""The selective scan of Mamba (arXiv 2312.00752, section 3.2): a linear recurrence whose coefficients follow the input.

``reference`` is the recurrence step by step. Every other backend runs mamba_ssm's kernel for CUDA tensors where that
package is installed, and else a scan in chunks, which takes a few dozen steps whatever the length.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from elfatt.ops.dispatch import use_reference

CHUNK = 16  # tokens that one step of the loop brings forward in every chunk at once


def selective_scan(
    x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """``h_t = exp(δ_t A) h_{t-1} + δ_t B_t x_t`` and ``y_t = C_t h_t + D x_t``, per channel, from ``h_{-1} = 0``.

    Computed in float32 at least. To torch's function modes it is one function, so that a counter can tell it apart.

    Args:
        x: Sequences ``[B, K, L, D]``, of K groups with coefficients of their own.
        delta: Step sizes δ, positive, ``[B, K, L, D]``.
        a: Rates A, negative, ``[K, D, N]``.
        b: Input coefficients B ``[B, K, L, N]``.
        c: Output coefficients C ``[B, K, L, N]``.
        d: Skip D ``[K, D]``.

    Returns:
        ``[B, K, L, D]`` in float32, or in float64 for float64 sequences.

    Raises:
        ValueError: Shapes that do not fit each other.
    """
    tensors = (x, delta, a, b, c, d)
    if has_torch_function(tensors):
        return handle_torch_function(selective_scan, tensors, *tensors)
    _check(*tensors)
    x, delta, a, b, c, d = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in tensors)
    if use_reference():
        return _reference(x, delta, a, b, c, d)
    if x.is_cuda and x.dtype == torch.float32 and _kernel() is not None:
        return _run_kernel(_kernel(), x, delta, a, b, c, d)
    decay = (delta[..., None] * a[:, None]).exp()
    inflow = (delta * x)[..., None] * b[..., None, :]
    state = _Recurrence.apply(decay.flatten(-2), inflow.flatten(-2)).view_as(decay)
    return (state * c[..., None, :]).sum(-1) + x * d[:, None]


def _check(x, delta, a, b, c, d):
    if x.ndim != 4:
        raise ValueError(f"x must be [B, K, L, D], got {tuple(x.shape)}")
    batch, groups, length, channels = x.shape
    states = a.shape[-1]
    wanted = {
        "delta": (delta, (batch, groups, length, channels)),
        "a": (a, (groups, channels, states)),
        "b": (b, (batch, groups, length, states)),
        "c": (c, (batch, groups, length, states)),
        "d": (d, (groups, channels)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")


def _reference(x, delta, a, b, c, d):
    state, out = torch.zeros_like(x[:, :, 0, :, None] * a), []
    for t in range(x.shape[2]):
        step = delta[:, :, t, :, None]
        state = torch.exp(step * a) * state + step * b[:, :, t, None] * x[:, :, t, :, None]
        out.append((c[:, :, t, None] * state).sum(-1) + d * x[:, :, t])
    return torch.stack(out, 2)


@cache
def _kernel() -> Callable | None:
    """mamba_ssm's fused scan, or None where the package is not installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def _run_kernel(kernel, x, delta, a, b, c, d):
    # the kernel scans the last axis, of [B, K·D, L] and [B, K, N, L]
    x_t, delta_t = (t.transpose(2, 3).flatten(1, 2).contiguous() for t in (x, delta))
    b_t, c_t = (t.transpose(2, 3).contiguous() for t in (b, c))
    y = kernel(x_t, delta_t, a.flatten(0, 1).contiguous(), b_t, c_t, d.flatten())
    return y.unflatten(1, x.shape[1::2]).transpose(2, 3)


class _Recurrence(torch.autograd.Function):
    """``h_t = a_t h_{t-1} + b_t`` along the last axis but one; its gradient is the same recurrence backwards."""

    @staticmethod
    def forward(ctx, a, b):
        state = _scan(a, b)
        ctx.save_for_backward(a, state)
        return state

    @staticmethod
    def backward(ctx, grad):
        a, state = ctx.saved_tensors
        following = F.pad(a[..., 1:, :], (0, 0, 0, 1))
        grad_b = _scan(following.flip(-2), grad.flip(-2)).flip(-2)
        return grad_b * F.pad(state[..., :-1, :], (0, 0, 1, 0)), grad_b


def _scan(a, b):
    """The recurrence in every chunk at once, then from chunk to chunk, which is a recurrence once more."""
    length = a.shape[-2]
    if length <= CHUNK:
        return _steps(a, b)
    a, b = (F.pad(t, (0, 0, 0, -length % CHUNK)).unflatten(-2, (-1, CHUNK)) for t in (a, b))
    state, decay = _steps(a, b), a.cumprod(-2)
    ends = _scan(decay[..., -1, :], state[..., -1, :])
    state[..., 1:, :, :] += decay[..., 1:, :, :] * ends[..., :-1, None, :]
    return state.flatten(-3, -2)[..., :length, :]


def _steps(a, b):
    state = b.clone(memory_format=torch.contiguous_format)
    for t in range(1, a.shape[-2]):
        state[..., t, :].addcmul_(a[..., t, :], state[..., t - 1, :])
    return state
