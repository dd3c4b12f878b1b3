"""Mamba's selective scan (arXiv 2312.00752, section 3.2): a linear recurrence with input-dependent coefficients.

``reference`` runs the recurrence step by step. Other backends use mamba_ssm's kernel for CUDA tensors if the package is
installed, else a chunked scan that takes a few dozen steps at any length.
"""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from elfatt.ops.dispatch import resolve


def selective_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute ``h_t = exp(δ_t A) h_{t-1} + δ_t B_t x_t``, ``y_t = C_t h_t + D x_t`` per channel, with ``h_{-1} = 0``.

    Computed in float32 or wider. Torch function modes see a single call, so that FLOP counters can recognise it.

    Args:
        x: Sequences ``[B, K, L, D]``, of K groups, each with its own coefficients.
        delta: Step sizes δ > 0 ``[B, K, L, D]``.
        a: Rates A < 0 ``[K, D, N]``.
        b: Input coefficients B ``[B, K, L, N]``.
        c: Output coefficients C ``[B, K, L, N]``.
        d: Skip D ``[K, D]``.
        backend: One of ``BACKENDS``; None for the active one.

    Returns:
        ``[B, K, L, D]`` in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Inconsistent shapes.
    """
    tensors = (x, delta, a, b, c, d)
    if has_torch_function(tensors):
        return handle_torch_function(selective_scan, tensors, *tensors, backend=backend)
    _check(*tensors)
    x, delta, a, b, c, d = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in tensors)
    return resolve(backend).selective_scan(x, delta, a, b, c, d)


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
