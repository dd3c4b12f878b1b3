"""The papers' formulas, taken literally: slow, any dtype up to float64; the tests' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elfatt.ops.pytorch import PyTorchBackend


class ReferenceBackend(PyTorchBackend):
    """``reference``: explicit sums and loops over blocks."""

    name = "reference"

    def softmax_attention(self, q, k, v, bias=None):
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(dim=-1, keepdim=True), v)

    def efficient_attention(self, q, k, v):
        q, k = (q - q.amax(dim=-1, keepdim=True)).exp(), (k - k.amax(dim=1, keepdim=True)).exp()
        q, k = q / q.sum(dim=-1, keepdim=True), k / k.sum(dim=1, keepdim=True)
        context = torch.einsum("bnhd,bnhe->bhde", k, v)
        return torch.einsum("bnhd,bhde->bnhe", q, context)

    def pool(self, q, side):
        edges = [[(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in q.shape[1:3]]
        cells = [q[:, t:b, l:r].mean(dim=(1, 2)) for t, b in edges[0] for l, r in edges[1]]  # noqa: E741
        return torch.stack(cells, dim=1)

    def depthwise_conv(self, x, weight, bias):
        _, h, w, _ = x.shape
        k = weight.shape[-1]
        padded = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
        out = sum(padded[:, i : i + h, j : j + w] * weight[:, 0, i, j] for i in range(k) for j in range(k))
        return out if bias is None else out + bias

    def attend_blocks(self, qkv, *, num_heads, block, lepe):
        (bh, bw), (b, h, w, _, c) = block, qkv.shape
        padded = qkv.new_zeros(b, h + -h % bh, w + -w % bw, 3, c)
        padded[:, :h, :w] = qkv
        out = []
        for i in range(0, h, bh):
            for j in range(0, w, bw):
                q, k, v = (x.squeeze(3) for x in padded[:, i : i + bh, j : j + bw].split(1, dim=3))
                tokens = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)) for x in (q, k, v))
                out.append(self.add_lepe(self.softmax_attention(*tokens).reshape(v.shape), v, lepe))
        return torch.stack(out, dim=1).flatten(0, 1)

    def selective_scan(self, x, delta, a, b, c, d):
        state, out = torch.zeros_like(x[:, :, 0, :, None] * a), []
        for t in range(x.shape[2]):
            step = delta[:, :, t, :, None]
            state = torch.exp(step * a) * state + step * b[:, :, t, None] * x[:, :, t, :, None]
            out.append((c[:, :, t, None] * state).sum(-1) + d * x[:, :, t])
        return torch.stack(out, 2)
