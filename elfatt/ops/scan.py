"""The selective scan of Mamba (arXiv 2312.00752, section 3.2): a linear recurrence whose coefficients follow the input.

``reference`` is the recurrence step by step. Every other backend runs mamba_ssm's kernel for CUDA tensors where that
package is installed, and else a scan in chunks, which takes a few dozen steps whatever the length.
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
    """``h_t = exp(δ_t A) h_{t-1} + δ_t B_t x_t`` and ``y_t = C_t h_t + D x_t``, per channel, from ``h_{-1} = 0``.

    Computed in float32 at least. To torch's function modes it is one function, so that a counter can tell it apart.

    Args:
        x: Sequences ``[B, K, L, D]``, of K groups with coefficients of their own.
        delta: Step sizes δ, positive, ``[B, K, L, D]``.
        a: Rates A, negative, ``[K, D, N]``.
        b: Input coefficients B ``[B, K, L, N]``.
        c: Output coefficients C ``[B, K, L, N]``.
        d: Skip D ``[K, D]``.
        backend: One of ``BACKENDS``, or None for the ambient one.

    Returns:
        ``[B, K, L, D]`` in float32, or in float64 for float64 sequences.

    Raises:
        ValueError: Shapes that do not fit each other.
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
