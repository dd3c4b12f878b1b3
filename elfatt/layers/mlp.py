"""Transformer MLP, chunked over tokens for CPU inference."""

from __future__ import annotations

import timm.layers
import torch

from elfatt.ops.geometry import count_blocks

TOKENS = 2048  # maximum per chunk: enough to reuse the weights, few enough to keep hidden activations in cache


class Mlp(timm.layers.Mlp):
    """timm's ``Mlp``, with the same parameters and results.

    In CPU inference, hidden activations take constant memory whatever the map size.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., C]`` to the same shape."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
            return super().forward(x)
        rows = x.flatten(0, -2)
        if len(rows) <= TOKENS:
            return super().forward(x)
        chunks = rows.tensor_split(count_blocks(len(rows), TOKENS))
        return torch.cat([super(Mlp, self).forward(chunk) for chunk in chunks]).unflatten(0, x.shape[:-1])
