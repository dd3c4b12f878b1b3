"""Which implementation runs an operation: one switch for every operation of the package.

``reference``   the formula written as it stands in the paper: slow, any dtype up to float64, the oracle of the tests
``math``        softmax attention as two explicit matrix products (the paper's "nFA")
``sdpa``        softmax attention through ``torch.nn.functional.scaled_dot_product_attention`` (the paper's "FA")
``flash_attn``  softmax attention through the flash-attn package; refuses tensors that it cannot take
``triton``      the ELFATT operation and LePE as fused CUDA kernels, forward and backward; the rest as ``sdpa``
``cpp``         the same as C++ kernels for a CPU, compiled when they first run
``auto``        the default: ``triton`` for CUDA tensors and ``cpp`` for CPU tensors that their kernels can take, else
                ``sdpa``, whose own dispatcher holds the FlashAttention kernels

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
BACKENDS = ("auto", "reference", "math", "sdpa", "flash_attn", "triton", "cpp")
# the backends with kernels of our own, by the device that ``auto`` takes them on
FUSED = {"cuda": "triton", "cpu": "cpp"}
_active = "auto"
_has_triton = importlib.util.find_spec("triton") is not None
_explained: set[tuple[str, str]] = set()
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
    return _can_run("triton", x, widths, raise_error)


def can_run_cpp(x: torch.Tensor, *, raise_error: bool = False) -> bool:
    """Whether the C++ kernels can take this map; they are compiled by the first question that nothing else denies.

    Args:
        x: Map ``[B, H, W, C]``, of the packed queries, keys and values or of what LePE convolves.
        raise_error: Raise with the reason in place of returning False.

    Raises:
        ValueError: With ``raise_error``, naming what does not fit and the remedy.
    """
    return _can_run("cpp", x, (), raise_error)


def fused_backend(x: torch.Tensor, widths: tuple[int, ...] = ()) -> str | None:
    """Which kernels of our own run this operation, ``triton`` or ``cpp``, or None for PyTorch's operators.

    Under ``auto`` each reason why not is logged once. What is exported or traced (``torch.export``, ONNX, TorchScript)
    and what ``torch.func`` or forward-mode differentiation transforms has PyTorch's operators alone.

    Raises:
        ValueError: The backend was chosen by name and cannot run.
    """
    if _active in FUSED.values():
        _can_run(_active, x, widths, raise_error=True)
        return _active
    backend = FUSED.get(x.device.type)
    if _active != "auto" or backend is None or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return None
    if _is_transformed():
        return None
    if reason := _why_not(backend, x, widths):
        _explain_once(backend, reason)
        return None
    return backend


def _can_run(backend, x, widths, raise_error):
    reason = _why_not(backend, x, widths)
    if reason is None and raise_error and _is_transformed():
        reason = "its operators have a first derivative by backward() only, none for torch.func and forward mode"
    if reason and raise_error:
        raise ValueError(f"{backend} cannot run a map of shape {tuple(x.shape)}: {reason}; use 'sdpa'")
    return not reason


def _why_not(backend, x, widths):
    if backend == "cpp":
        return _why_not_cpp(x.device.type, x.dtype)
    reason = _why_not_triton(x.device.type, x.device.index, x.dtype, widths)
    if reason is None and x.stride(0) >= 2**31:
        reason = "it numbers the elements of one image in 32 bits"
    return reason


# torch.compile asks these while it traces and keeps the answer
@torch.compiler.assume_constant_result
def _why_not_triton(device: str, index: int | None, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    if not has_triton():
        return "the package is not installed"
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
def _why_not_cpp(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"it needs CPU tensors, not {device}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it needs bfloat16 or float32, not {str(dtype).removeprefix('torch.')}"
    from elfatt.ops.cpp.build import problem

    return problem()


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    """Whether derivatives are taken in a way that the fused operators would pass over, without an error or with one."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def _explain_once(backend: str, reason: str) -> None:
    if (backend, reason) not in _explained:
        _explained.add((backend, reason))
        _logger.warning("backend 'auto' runs without the %s kernels: %s", backend, reason)


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Context in which products on the device of ``x`` keep the dtypes they are given."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_slow_half(x: torch.Tensor) -> bool:
    """Whether a half-precision tensor is on a CPU whose convolutions and products are many times faster in float32."""
    return x.device.type == "cpu" and x.dtype in _SLOW_ON_THIS_CPU
