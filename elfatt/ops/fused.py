"""The whole ELFATT operation, and LePE alone, as PyTorch operators with their own backward: Triton or C++ kernels.

``torch.library`` makes each one node for ``torch.compile`` (no graph break), for activation checkpointing and for CUDA
graphs; the kernels, ``elfatt/ops/triton`` or ``elfatt/ops/cpp``, are imported at the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# written out, for older versions of torch cannot read them from these functions' types
_KERNELS = "Tensor? weight_global, Tensor? bias_global, Tensor? weight_local, Tensor? bias_local"
_OPTIONS = "SymInt[] num_heads, SymInt global_channels, SymInt[] block, str backend"


def fused_attention(
    qkv: Tensor,
    *,
    backend: str,
    num_heads: tuple[int, int],
    global_channels: int,
    block: tuple[int, int],
    lepe_global: tuple[Tensor, Tensor | None] | None = None,
    lepe_local: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """``elfatt_attention`` for a block that fits the map, in the dtype of ``qkv``.

    Args:
        qkv: ``[B, H, W, 3C]``; copied when it is not contiguous.
        backend: Whose kernels run it, ``triton`` or ``cpp``.
        num_heads: Heads of the global and of the local branch.
        global_channels: Channels of the global branch.
        block: Height and width of a block in tokens.
        lepe_global: Kernels and bias, or None; of any floating dtype, used in float32.
        lepe_local: Kernels and bias, or None.

    Raises:
        ValueError: A branch's kernels are not ``[channels, 1, 3, 3]`` and ``[channels]``, or on another device.
    """
    local_channels = qkv.shape[-1] // 3 - global_channels
    lepes = []
    for lepe, channels in ((lepe_global, global_channels), (lepe_local, local_channels)):
        weight, bias = lepe if lepe is not None and channels else (None, None)
        if weight is not None:
            _check_lepe(qkv, weight, bias, channels)
        lepes += (weight, bias)
    return _forward(qkv, *lepes, list(num_heads), global_channels, list(block), backend)[0]


@torch.library.custom_op(
    "elfatt::attention",
    mutates_args=(),
    schema=f"(Tensor qkv, {_KERNELS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    qkv: Tensor,
    weight_global: Tensor | None,
    bias_global: Tensor | None,
    weight_local: Tensor | None,
    bias_local: Tensor | None,
    num_heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and what the backward pass keeps: the context softmax(K)ᵀV, K's and the scores' log-sum-exp."""
    lepes = (_contiguous(x) for x in (weight_global, bias_global, weight_local, bias_local))
    results = _empty(qkv, num_heads, global_channels, block, backend)
    _module(backend).forward(qkv.contiguous(), *lepes, *results, num_heads, global_channels, block)
    return results


@_forward.register_fake
def _(qkv, weight_global, bias_global, weight_local, bias_local, num_heads, global_channels, block, backend):
    return _empty(qkv, num_heads, global_channels, block, backend)


@torch.library.custom_op(
    "elfatt::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor qkv, {_KERNELS}, Tensor context, Tensor key_lse, Tensor row_lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor,
    qkv: Tensor,
    weight_global: Tensor | None,
    bias_global: Tensor | None,
    weight_local: Tensor | None,
    bias_local: Tensor | None,
    context: Tensor,
    key_lse: Tensor,
    row_lse: Tensor,
    num_heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv and of each kernel and bias; an empty tensor for what is None."""
    dqkv, *sums = _module(backend).backward(
        dout.contiguous(), qkv.contiguous(), _contiguous(weight_global), _contiguous(weight_local),
        context, key_lse, row_lse, num_heads, global_channels, block,
    )  # fmt: skip
    gradients = []
    for weight, bias, rows in zip((weight_global, weight_local), (bias_global, bias_local), sums, strict=True):
        gradients += (qkv.new_empty(0), qkv.new_empty(0)) if weight is None else _unpack(rows, weight, bias)
    return dqkv, *gradients


@_backward.register_fake
def _(dout, qkv, weight_global, bias_global, weight_local, bias_local, *_):
    pairs = ((weight_global, bias_global), (weight_local, bias_local))
    lepes = ((_like(w, qkv), _like(b, qkv if w is None else w)) for w, b in pairs)
    return qkv.new_empty(qkv.shape), *(x for pair in lepes for x in pair)


def _keep(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.global_channels, ctx.block, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, dout, *_):
    saved = ctx.saved_tensors  # under activation checkpointing they can be taken once
    gradients = _backward(dout, *saved, ctx.num_heads, ctx.global_channels, ctx.block, ctx.backend)
    return *(None if x is None else dx for x, dx in zip(saved, gradients, strict=False)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def fused_lepe(
    v: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, backend: str
) -> Tensor:
    """``residual + L(v)`` with 3×3 kernels, in the dtype of ``v``.

    Args:
        v: Map ``[B, H, W, C]``; a slice of a contiguous map's channels is not copied.
        weight: Kernels ``[C, 1, 3, 3]`` of any floating dtype, used in float32.
        bias: ``[C]`` or None.
        residual: ``[B, H, W, C]`` or None.
        backend: Whose kernels run it, ``triton`` or ``cpp``.

    Raises:
        ValueError: The kernels are not of this shape, or on another device.
    """
    _check_lepe(v, weight, bias, v.shape[-1])
    return _lepe(v, weight, bias, None if residual is None else residual.to(v.dtype), backend)


@torch.library.custom_op(
    "elfatt::lepe",
    mutates_args=(),
    schema="(Tensor v, Tensor weight, Tensor? bias, Tensor? residual, str backend) -> Tensor",
)
def _lepe(v: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str) -> Tensor:
    out = v.new_empty(v.shape)
    _module(backend).lepe(_evenly_strided(v), weight.contiguous(), _contiguous(bias), _contiguous(residual), out)
    return out


@_lepe.register_fake
def _(v, weight, bias, residual, backend):
    return v.new_empty(v.shape)


@torch.library.custom_op(
    "elfatt::lepe_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor v, Tensor weight, Tensor? bias, str backend) -> (Tensor, Tensor, Tensor)",
)
def _lepe_backward(
    dout: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = _module(backend)
    dout, dv = dout.contiguous(), v.new_empty(v.shape)
    module.lepe(dout, weight.contiguous(), None, None, dv, transposed=True)
    return dv, *_unpack(module.lepe_sums(_evenly_strided(v), dout), weight, bias)


@_lepe_backward.register_fake
def _(dout, v, weight, bias, backend):
    return v.new_empty(v.shape), weight.new_empty(weight.shape), _like(bias, weight)


def _keep_lepe(ctx, inputs, output):
    *tensors, residual, ctx.backend = inputs
    ctx.residual = residual is not None
    ctx.save_for_backward(*tensors)


def _differentiate_lepe(ctx, dout):
    v, weight, bias = ctx.saved_tensors
    dv, dweight, dbias = _lepe_backward(dout, v, weight, bias, ctx.backend)
    return dv, dweight, None if bias is None else dbias, dout if ctx.residual else None, None


_lepe.register_autograd(_differentiate_lepe, setup_context=_keep_lepe)


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"elfatt.ops.{backend}")


def _check_lepe(x, weight, bias, channels):
    """The kernels read memory by these shapes, on this device."""
    given = [weight] if bias is None else [weight, bias]
    if [tuple(y.shape) for y in given] != [(channels, 1, 3, 3), (channels,)][: len(given)]:
        shapes = " and ".join(str(tuple(y.shape)) for y in given)
        raise ValueError(
            f"LePE of {channels} channels needs kernels [{channels}, 1, 3, 3] and [{channels}], got {shapes}"
        )
    if other := next((y.device for y in given if y.device != x.device), None):
        raise ValueError(f"LePE's kernels are on {other}, the map is on {x.device}: move the module")


def _unpack(sums, weight, bias):
    """Gradients of a weight and a bias, an empty tensor for None, from the kernels' ``[10, channels]``."""
    dweight = sums[:9].t().reshape(weight.shape).to(weight.dtype).contiguous()
    return dweight, sums.new_empty(0, dtype=weight.dtype) if bias is None else sums[9].to(bias.dtype, copy=True)


def _empty(qkv, num_heads, global_channels, block, backend):
    """The forward pass's results."""
    if backend == "triton":
        return _module(backend).new_buffers(qkv, num_heads, global_channels, block)
    b, h, w, packed = qkv.shape
    width = global_channels // num_heads[0] if global_channels else 0
    return (
        qkv.new_empty(b, h, w, packed // 3),
        qkv.new_empty(b, num_heads[0], width, width, dtype=torch.float32),
        qkv.new_empty(b, num_heads[0], width, dtype=torch.float32),
        qkv.new_empty(b, num_heads[1], 0, block[0] * block[1], dtype=torch.float32),
    )


def _like(x, other):
    return other.new_empty(0) if x is None else x.new_empty(x.shape)


def _contiguous(x):
    return None if x is None else x.contiguous()


def _evenly_strided(x):
    """A map whose tokens all lie at one distance, as in a slice of a contiguous map's channels; else a copy."""
    _, h, w, _ = x.shape
    even = x.stride(3) == 1 and x.stride(1) == w * x.stride(2) and x.stride(0) == h * x.stride(1)
    return x if even else x.contiguous()
