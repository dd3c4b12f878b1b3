"""Linear recurrence of the selective scan: mamba_ssm's kernel or a chunked scan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

CHUNK = 16  # tokens per chunk; each step of the loop advances all chunks by one token


def fast_scan(
    x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """Run ``selective_scan`` by mamba_ssm's kernel if it is installed and supports the tensors, else in chunks."""
    if x.is_cuda and x.dtype == torch.float32 and _kernel() is not None:
        return _run_kernel(_kernel(), x, delta, a, b, c, d)
    decay = (delta[..., None] * a[:, None]).exp()
    inflow = (delta * x)[..., None] * b[..., None, :]
    state = _Recurrence.apply(decay.flatten(-2), inflow.flatten(-2)).view_as(decay)
    return (state * c[..., None, :]).sum(-1) + x * d[:, None]


@cache
def _kernel() -> Callable | None:
    """Return mamba_ssm's fused scan, or None if it is not installed."""
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
    """``h_t = a_t h_{t-1} + b_t`` along the second-to-last axis; its gradient is the same recurrence in reverse."""

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
    """Scan all chunks in parallel, then scan over the chunks."""
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
