"""Call the C++ kernels: one call per pass, because call overhead dominates on small maps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch

from elfatt.ops.cpp.build import library

TILE = (8, 64)  # tokens of the map per task; its rows fit in cache
SPLIT = 512  # minimum tokens per split
SMALL = 4096  # map elements up to which one thread finishes before others would start


class _Shape(ctypes.Structure):
    """Sizes of the map, the tasks and, for attention, both branches; mirrors ``Shape`` in ``kernels.cpp``."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "images",
            "height",
            "width",
            "channels",
            "threads",
            "split",
            "tile_height",
            "tile_width",
            "heads_global",
            "heads_local",
            "global_channels",
            "block_height",
            "block_width",
        )
    ]


_structure = lru_cache(maxsize=1024)(_Shape)
_INT, _ADDRESS = ctypes.c_int, ctypes.c_void_p
_ARGUMENTS: dict[str, list[type]] = {  # after the shape
    "forward": [_ADDRESS] * 8,
    "backward": [_ADDRESS] * 9,
    "lepe_forward": [_ADDRESS, _INT, *[_ADDRESS] * 4, _INT],
    "lepe_backward": [_ADDRESS, _INT, _ADDRESS, _ADDRESS],
}


def new_buffers(
    qkv: torch.Tensor, heads: Sequence[int], global_channels: int, block: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate the output, the context, K's log-sum-exp and the scores' log-sum-exp, which is unused and empty."""
    b, h, w, packed = qkv.shape
    width = global_channels // heads[0] if global_channels else 0
    return (
        qkv.new_empty((b, h, w, packed // 3)),
        qkv.new_empty((b, heads[0], width, width), dtype=torch.float32),
        qkv.new_empty((b, heads[0], width), dtype=torch.float32),
        qkv.new_empty((0,), dtype=torch.float32),
    )


def forward(
    qkv: torch.Tensor,
    weight_global: torch.Tensor | None,
    bias_global: torch.Tensor | None,
    weight_local: torch.Tensor | None,
    bias_local: torch.Tensor | None,
    out: torch.Tensor,
    context: torch.Tensor,
    key_lse: torch.Tensor,
    row_lse: torch.Tensor,
    heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
) -> None:
    """Compute ``out``, ``context`` and ``key_lse`` from contiguous inputs; ``row_lse`` is unused."""
    _call(
        "forward", qkv.dtype, _shape(out, *heads, global_channels, *block),
        qkv, _float(weight_global), _float(bias_global), _float(weight_local), _float(bias_local),
        out, context, key_lse,
    )  # fmt: skip


def backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    weight_global: torch.Tensor | None,
    weight_local: torch.Tensor | None,
    context: torch.Tensor,
    key_lse: torch.Tensor,
    row_lse: torch.Tensor,
    heads: Sequence[int],
    global_channels: int,
    block: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return gradients of qkv and, per branch with LePE, of its nine weights and bias: float32 ``[10, channels]``."""
    dqkv, *sums = torch.empty_like(qkv), _new_sums(weight_global), _new_sums(weight_local)
    _call(
        "backward", qkv.dtype, _shape(dout, *heads, global_channels, *block),
        qkv, dout, _float(weight_global), _float(weight_local), context, key_lse, dqkv, *sums,
    )  # fmt: skip
    return dqkv, *sums


def lepe(
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    transposed: bool = False,
) -> None:
    """Write ``residual + L(v)`` or ``Lᵀ(v)`` to ``out``; maps are contiguous, except that ``v`` may be a slice."""
    arguments = v, v.stride(2), _float(weight), _float(bias), residual, out, transposed
    _call("lepe_forward", v.dtype, _shape(v), *arguments)


def lepe_sums(v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """Return the float32 gradients ``[10, channels]`` of LePE's nine weights and bias."""
    sums = v.new_empty((10, v.shape[-1]), dtype=torch.float32)
    _call("lepe_backward", v.dtype, _shape(v), v, v.stride(2), dout, sums)
    return sums


def _shape(x, *branches):
    b, h, w, c = x.shape
    threads = 1 if b * h * w * c <= SMALL else torch.get_num_threads()  # of the calling Python thread
    return _structure(b, h, w, c, threads, SPLIT, *TILE, *branches)


def _call(name, dtype, shape, *arguments):
    """Call a kernel, passing tensors by address; temporaries in the arguments live until it returns."""
    if not _function(name, dtype)(shape, *[x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]):
        raise MemoryError("the C++ kernels ran out of memory")


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = [_Shape, *_ARGUMENTS[name]], _INT
    return function


def _float(x):
    return x if x is None or x.dtype is torch.float32 else x.float()


def _new_sums(weight):
    return None if weight is None else weight.new_empty((10, weight.shape[0]), dtype=torch.float32)
