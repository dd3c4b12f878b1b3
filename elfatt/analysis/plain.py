"""The baseline of every ratio: ELFATT in straightforward PyTorch, as an operation and inside the models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from elfatt.ops import use_backend


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """``use_backend``, or with ``plain`` the baseline in place of ELFATT and ``sdpa`` for the rest."""
    if name != "plain":
        with use_backend(name):
            yield
        return
    with use_backend("sdpa"), patch("elfatt.attention.elfatt.elfatt_attention", plain_elfatt):
        yield


def plain_elfatt(qkv, *, num_heads, global_channels, block_size, lepe_global, lepe_local) -> torch.Tensor:
    """ELFATT as one writes it down first, with reshapes, transposes and NCHW convolutions; its two branches with LePE.

    The arguments are those of ``elfatt.ops.elfatt_attention``.
    """
    b, h, w, c = *qkv.shape[:3], qkv.shape[3] // 3
    c1, c2 = global_channels, c - global_channels
    bh, bw = min(block_size, h), min(block_size, w)
    q, k, v = qkv.reshape(b, h * w, 3, c).permute(2, 0, 1, 3)

    def heads(x, n):
        return x.reshape(*x.shape[:2], n, -1).transpose(1, 2)

    def lepe(x, size, kernel):
        image = x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], *size)
        return F.conv2d(image, *kernel, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)

    query, key, value = (heads(x[..., :c1], num_heads[0]) for x in (q, k, v))
    out_global = query.softmax(-1) @ (key.softmax(-2).transpose(-2, -1) @ value)
    out_global = out_global.transpose(1, 2).reshape(b, h * w, c1) + lepe(v[..., :c1], (h, w), lepe_global)

    rows, columns = -(-h // bh), -(-w // bw)

    def blocks(x):
        x = F.pad(x[..., c1:].reshape(b, h, w, c2), (0, 0, 0, columns * bw - w, 0, rows * bh - h))
        return x.reshape(b, rows, bh, columns, bw, c2).permute(0, 1, 3, 2, 4, 5).reshape(-1, bh * bw, c2)

    q, k, v = (blocks(x) for x in (q, k, v))
    out_local = F.scaled_dot_product_attention(*(heads(x, num_heads[1]) for x in (q, k, v)))
    out_local = out_local.transpose(1, 2).reshape(-1, bh * bw, c2) + lepe(v, (bh, bw), lepe_local)
    out_local = out_local.reshape(b, rows, columns, bh, bw, c2).permute(0, 1, 3, 2, 4, 5)
    out_local = out_local.reshape(b, rows * bh, columns * bw, c2)[:, :h, :w]
    return torch.cat([out_global.reshape(b, h, w, c1), out_local], dim=-1)
