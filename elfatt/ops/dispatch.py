"""Which implementation runs an operation: one switch for every operation of the package.

``reference``   the formula written as it stands in the paper: slow, any dtype up to float64, the oracle of the tests
``math``        softmax attention as two explicit matrix products (the paper's "nFA")
``sdpa``        softmax attention through ``torch.nn.functional.scaled_dot_product_attention`` (the paper's "FA")
``flash_attn``  softmax attention through the flash-attn package; refuses tensors that it cannot take
``triton``      the ELFATT operation and LePE as fused CUDA kernels, forward and backward; the rest as ``sdpa``
``auto``        the default: ``triton`` for CUDA tensors that its kernels can take, else ``sdpa``, whose own dispatcher
                holds the FlashAttention kernels

``math``, ``sdpa`` and ``flash_attn`` differ in how softmax attention runs; linear branches are the same in each.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# half precisions for which this CPU has no vector instructions
_SLOW_ON_THIS_CPU = {torch.bfloat16, torch.float16}
if torch.backends.mkldnn.is_available():
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _SLOW_ON_THIS_CPU.remove(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        _SLOW_ON_THIS_CPU.remove(torch.float16)
BACKENDS = ("auto", "reference", "math", "sdpa", "flash_attn", "triton")
_active = "auto"
_has_triton = importlib.util.find_spec("triton") is not None
_explained: set[str] = set()
_logger = logging.getLogger("elfatt")


def active_backend() -> str:
    """Name of the backend in force, one of ``BACKENDS``."""
    return _active


def use_reference() -> bool:
    """Whether operations must run their reference formula."""
    return _active == "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the ``with`` block on one backend, for the whole process.

    Activation checkpointing recomputes in the backward pass: keep ``backward()`` inside the block as well.

    Args:
        name: One of ``BACKENDS``.

    Raises:
        ValueError: The name is unknown, or the backend is not installed.
    """
    global _active
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "flash_attn" and not has_flash_attn():
        raise ValueError("backend 'flash_attn' is not installed: pip install flash-attn, or use 'sdpa'")
    if name == "triton" and not has_triton():
        raise ValueError("backend 'triton' is not installed: pip install triton, or use 'sdpa'")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


def has_flash_attn() -> bool:
    """Whether the flash-attn package can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def can_run_flash_attn(q: torch.Tensor, bias: torch.Tensor | None = None, *, raise_error: bool = False) -> bool:
    """Whether the flash-attn package can take these tensors.

    Args:
        q: Queries ``[B, N, heads, d]``; keys and values share their dtype and device.
        bias: Additive bias of the scores, if any.
        raise_error: Raise with the reason in place of returning False.

    Raises:
        ValueError: With ``raise_error``, naming what does not fit and the remedy.
    """
    if bias is not None:
        reason = "it cannot add a position bias to the scores"
    elif q.device.type != "cuda":
        reason = f"it needs CUDA tensors, not {q.device.type}"
    elif q.dtype not in (torch.float16, torch.bfloat16):
        reason = f"it needs float16 or bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    elif q.shape[-1] > 256:
        reason = f"it takes heads of at most 256 channels, not {q.shape[-1]}"
    elif not has_flash_attn():
        reason = "the package is not installed"
    else:
        return True
    if raise_error:
        raise ValueError(f"flash_attn cannot run queries of shape {tuple(q.shape)}: {reason}; use 'sdpa'")
    return False


def has_triton() -> bool:
    """Whether the triton package can be imported."""
    return _has_triton


def can_run_triton(x: torch.Tensor, widths: tuple[int, ...] = (), *, raise_error: bool = False) -> bool:
    """Whether the Triton kernels can take this map.

    Args:
        x: Map ``[B, H, W, C]``, of the packed queries, keys and values or of what LePE convolves.
        widths: Channels of a head in each branch of attention.
        raise_error: Raise with the reason in place of returning False.

    Raises:
        ValueError: With ``raise_error``, naming what does not fit and the remedy.
    """
    reason = _why_not_triton(x.device.type, x.device.index, x.dtype, widths)
    if reason is None and x.stride(0) >= 2**31:
        reason = "it numbers the elements of one image in 32 bits"
    if reason and raise_error:
        raise ValueError(f"triton cannot run a map of shape {tuple(x.shape)}: {reason}; use 'sdpa'")
    return not reason


def use_triton(x: torch.Tensor, widths: tuple[int, ...] = ()) -> bool:
    """Whether the Triton kernels run this operation; under ``auto`` each reason why not is logged once.

    Raises:
        ValueError: ``triton`` was chosen and cannot run.
    """
    if _active == "triton":
        return can_run_triton(x, widths, raise_error=True)
    if _active != "auto" or not x.is_cuda:
        return False
    if can_run_triton(x, widths):
        return True
    _explain_once(_why_not_triton(x.device.type, x.device.index, x.dtype, widths) or "the map is too large")
    return False


# torch.compile asks these while it traces and keeps the answer
@torch.compiler.assume_constant_result
def _why_not_triton(device: str, index: int | None, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    if not has_triton():
        return "the package is not installed"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        return f"it needs torch 2.7 or newer, for its version of Triton, not {torch.__version__}"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors, not {device} (TRITON_INTERPRET=1 interprets its kernels on a CPU)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it needs float16, bfloat16 or float32, not {str(dtype).removeprefix('torch.')}"
    if max(widths, default=0) > 64:
        return f"it takes heads of at most 64 channels, not {max(widths)}"
    if device == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


@torch.compiler.assume_constant_result
def _explain_once(reason: str) -> None:
    if reason not in _explained:
        _explained.add(reason)
        _logger.warning("backend 'auto' runs without the Triton kernels: %s", reason)


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Context in which products on the device of ``x`` keep the dtypes they are given."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_slow_half(x: torch.Tensor) -> bool:
    """Whether a half-precision tensor is on a CPU whose convolutions and products are many times faster in float32."""
    return x.device.type == "cpu" and x.dtype in _SLOW_ON_THIS_CPU
