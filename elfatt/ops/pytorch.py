"""PyTorch implementations of all operations: the base class of all backends."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from elfatt.ops.geometry import Filter, cat_with_blocks, from_blocks, to_blocks
from elfatt.ops.recurrence import fast_scan

# half-precision dtypes without vector instructions on this CPU
_SLOW_ON_THIS_CPU = {torch.bfloat16, torch.float16}
if torch.backends.mkldnn.is_available():
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _SLOW_ON_THIS_CPU.remove(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        _SLOW_ON_THIS_CPU.remove(torch.float16)


class PyTorchBackend:
    """``sdpa``: softmax attention by ``scaled_dot_product_attention``; arguments as in the public operations.

    Attributes:
        name: Name for ``use_backend``.
        devices: Supported device types; empty for any.
        dtypes: Supported floating-point dtypes; empty for any.
    """

    name = "sdpa"
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def unsupported_reason(
        self, x: torch.Tensor | None = None, widths: tuple[int, ...] = (), bias: torch.Tensor | None = None
    ) -> str | None:
        """Return in one line why this backend cannot run an operation, or None if it can.

        Args:
            x: Input ``[B, H, W, C]`` of ELFATT or LePE, or queries ``[B, N, heads, d]`` of softmax attention; None
                checks the machine only.
            widths: Channels per head of each branch.
            bias: Bias on the scores of softmax attention.
        """
        return None

    def softmax_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if bias is not None:
            bias = bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    def efficient_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if is_slow_half(v):
            with without_autocast(v):
                return self.efficient_attention(q.float(), k.float(), v.float()).to(v.dtype)
        # explicit dtype: autocast would store the weights in float32; sums are float32 either way
        q = q.softmax(dim=-1, dtype=q.dtype)
        k = k.softmax(dim=1, dtype=k.dtype)
        context = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return (q.transpose(1, 2) @ context).transpose(1, 2)

    def agent_attention(self, q, k, v, *, num_heads, agents, gather_bias, broadcast_bias) -> torch.Tensor:
        b, h, w, c = q.shape
        a = self.pool(q, agents).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        q, k, v = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = _attend_explicitly(q, a, _attend_explicitly(a, k, v, gather_bias), broadcast_bias)
        return out.transpose(1, 2).reshape(b, h, w, c)

    def pool(self, q: torch.Tensor, side: int) -> torch.Tensor:
        """Average-pool a map ``[B, H, W, C]`` to a square grid ``[B, side², C]``."""
        if any(isinstance(n, torch.SymInt) for n in q.shape[1:3]):  # ONNX has no adaptive pooling for dynamic sizes
            rows, columns = (_averages(side, n, q) for n in q.shape[1:3])
            return (columns @ (rows @ q.flatten(2)).unflatten(2, q.shape[2:])).flatten(1, 2)
        return F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)

    def depthwise_conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if is_slow_half(x):
            with without_autocast(x):
                return _convolve(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        return _convolve(x, weight, bias)

    def add_lepe(self, out: torch.Tensor, v: torch.Tensor, lepe: Filter | None) -> torch.Tensor:
        if lepe is None:
            return out
        # in place: no backward pass needs the convolution's output
        return self.depthwise_conv(v, *lepe).add_(out)

    def selective_scan(self, x, delta, a, b, c, d) -> torch.Tensor:
        return fast_scan(x, delta, a, b, c, d)

    def block_attention(
        self, qkv: torch.Tensor, *, num_heads: int, block: tuple[int, int], lepe: Filter | None
    ) -> torch.Tensor:
        blocks = self.attend_blocks(qkv, num_heads=num_heads, block=block, lepe=lepe)
        return from_blocks(blocks, qkv.shape[1:3])

    def attend_blocks(
        self, qkv: torch.Tensor, *, num_heads: int, block: tuple[int, int], lepe: Filter | None
    ) -> torch.Tensor:
        """``block_attention`` before merging the blocks: ``[B * rows * columns, bh, bw, C]``."""
        q, k, v = (to_blocks(x, block) for x in qkv.unbind(3))
        tokens = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)) for x in (q, k, v))
        return self.add_lepe(self.softmax_attention(*tokens).reshape(v.shape), v, lepe)

    def elfatt_attention(
        self,
        qkv: torch.Tensor,
        *,
        num_heads: tuple[int, int],
        global_channels: int,
        block: tuple[int, int],
        lepe_global: Filter | None,
        lepe_local: Filter | None,
    ) -> torch.Tensor:
        channels = qkv.shape[-1] // 3
        qkv = qkv.unflatten(-1, (3, channels))
        qkv_global, qkv_local = qkv.split((global_channels, channels - global_channels), dim=-1)
        if global_channels == 0:
            return self.block_attention(qkv_local, num_heads=num_heads[1], block=block, lepe=lepe_local)
        q, k, v = qkv_global.unbind(3)
        tokens = (x.flatten(1, 2).unflatten(-1, (num_heads[0], -1)) for x in (q, k, v))
        out = self.add_lepe(self.efficient_attention(*tokens).reshape(v.shape), v, lepe_global)
        if global_channels == channels:
            return out
        blocks = self.attend_blocks(qkv_local, num_heads=num_heads[1], block=block, lepe=lepe_local)
        return cat_with_blocks(out, blocks)


SDPA = PyTorchBackend()


class MathBackend(PyTorchBackend):
    """``math``: softmax attention as two explicit matmuls, the paper's "nFA"."""

    name = "math"

    def softmax_attention(self, q, k, v, bias=None):
        scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)
        if bias is not None:
            scores = scores + bias
        # explicit dtype: autocast would store the weights in float32; sums are float32 either way
        return (scores.softmax(dim=-1, dtype=scores.dtype) @ v.transpose(1, 2)).transpose(1, 2)


class FlashAttnBackend(PyTorchBackend):
    """``flash_attn``: softmax attention by the flash-attn package."""

    name = "flash_attn"
    devices = ("cuda",)
    dtypes = (torch.float16, torch.bfloat16)

    def unsupported_reason(self, x=None, widths=(), bias=None):
        if x is not None:
            if bias is not None:
                return "it does not support a bias on the scores"
            if x.device.type not in self.devices:
                return f"it needs CUDA tensors, not {x.device.type}"
            if x.dtype not in self.dtypes:
                return f"it needs float16 or bfloat16, not {dtype_name(x.dtype)}"
            if max(widths) > 256:
                return f"it supports heads of up to 256 channels, not {max(widths)}"
        return None if _has_flash_attn() else "it is not installed: pip install flash-attn"

    def softmax_attention(self, q, k, v, bias=None):
        if reason := self.unsupported_reason(q, (q.shape[-1],), bias):
            raise ValueError(refusal(self.name, q, reason))
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)


def refusal(name: str, x: torch.Tensor, reason: str) -> str:
    """Return the error message for a backend that was requested by name but cannot run."""
    return f"backend {name!r} does not support this tensor of shape {tuple(x.shape)}: {reason}; use 'sdpa'"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Disable autocast on the device of ``x``; a no-op if off, to keep autocast regions out of exported graphs."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_slow_half(x: torch.Tensor) -> bool:
    """Return True for half precision on a CPU whose convolutions and matmuls are much faster in float32."""
    return x.device.type == "cpu" and x.dtype in _SLOW_ON_THIS_CPU


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _convolve(x, weight, bias):
    x = x.permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1]).permute(0, 2, 3, 1)


def _averages(cells: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix ``[cells, length]`` of adaptive average pooling along one side."""
    cell = torch.arange(cells, device=like.device)[:, None]
    token = torch.arange(length, device=like.device)
    inside = (token >= cell * length // cells) & (token < ((cell + 1) * length + cells - 1) // cells)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


def _attend_explicitly(q, k, v, bias):
    scale = q.shape[-1] ** -0.5
    if q.dtype == torch.float16:  # products of large activations overflow float16
        with without_autocast(q):
            scores = (q.float() * scale) @ k.float().transpose(-2, -1) + bias.float()
        weights = scores.softmax(dim=-1).to(v.dtype)
    else:
        scores = (q * scale) @ k.transpose(-2, -1) + bias
        weights = scores.softmax(dim=-1).to(v.dtype)
    return weights @ v
