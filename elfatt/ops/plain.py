"""Benchmark baseline: a straightforward ELFATT with reshapes, transposes and NCHW convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elfatt.ops.pytorch import PyTorchBackend


class PlainBackend(PyTorchBackend):
    """``plain``: ELFATT in straightforward PyTorch; everything else as in ``sdpa``."""

    name = "plain"

    def elfatt_attention(self, qkv, *, num_heads, global_channels, block, lepe_global, lepe_local):
        b, h, w, c = qkv.shape
        c //= 3
        q, k, v = qkv.reshape(b, h * w, 3, c).permute(2, 0, 1, 3)
        split = (global_channels, c - global_channels)
        (q, q_local), (k, k_local), (v, v_local) = (x.split(split, dim=-1) for x in (q, k, v))
        out = []
        if global_channels:
            query, key, value = (_heads(x, num_heads[0]) for x in (q, k, v))
            attended = query.softmax(-1) @ (key.softmax(-2).transpose(-2, -1) @ value)
            attended = attended.transpose(1, 2).reshape(b, h * w, global_channels) + _lepe(v, (h, w), lepe_global)
            out.append(attended.reshape(b, h, w, global_channels))
        if global_channels < c:
            out.append(_local_branch(q_local, k_local, v_local, num_heads[1], (h, w), block, lepe_local))
        return torch.cat(out, dim=-1)


def _local_branch(q, k, v, num_heads, size, block, lepe):
    (h, w), (bh, bw), (b, _, c) = size, block, q.shape
    rows, columns = -(-h // bh), -(-w // bw)

    def cut(x):
        x = F.pad(x.reshape(b, h, w, c), (0, 0, 0, columns * bw - w, 0, rows * bh - h))
        return x.reshape(b, rows, bh, columns, bw, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, bh * bw, c)

    q, k, v = (cut(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*(_heads(x, num_heads) for x in (q, k, v)))
    out = out.transpose(1, 2).reshape(-1, bh * bw, c) + _lepe(v, block, lepe)
    out = out.reshape(b, rows, columns, bh, bw, c).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(b, rows * bh, columns * bw, c)[:, :h, :w]


def _heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _lepe(x, size, kernel):
    if kernel is None:
        return 0
    image = x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], *size)
    return F.conv2d(image, *kernel, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)
